"""MII's Python API over saved state: `mii_hcache.pipeline`."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import sys
import weakref
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from mii_hcache.config import HCacheConfig
from mii_hcache.engine.tokenizer import Tokenizer
from mii_hcache.errors import ConfigError, RequestError
from mii_hcache.runtime.generation import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    RestoreReport,
    SamplingParams,
)

if TYPE_CHECKING:
    from mii_hcache.engine.open import OpenedService

_log = logging.getLogger(__name__)

CONTEXT_TOKENS = 6
"""Prompt tokens that an answer is decoded behind: some tokenizers drop a space at the start of a text."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Response:
    """An answer, with the fields of MII's."""

    generated_text: str
    prompt_length: int
    """Tokens of the prompt."""
    generated_length: int
    """Tokens generated, a stop token or the tokens of a stop string included."""
    finish_reason: FinishReason
    """`stop` or `length`; equal to these strings."""
    hcache: RestoreReport
    """Where the prompt's tokens came from."""

    def __repr__(self) -> str:
        return self.generated_text


class _Answer:
    """One prompt and the answer to it. The engine thread alone touches it until `future` is done."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], prompt_text: str | None, stops: Sequence[str]):
        self.prompt_ids = prompt_ids
        self.prompt_text = prompt_text
        self.future: Future[GenerationResult] = Future()
        self._tokenizer = tokenizer
        self._stops = stops
        self._token_ids: list[int] = []
        self._stop_at: int | None = None

    def push(self, token_id: int) -> bool:
        """Take a token. True when a stop string is complete."""
        self._token_ids.append(token_id)
        if self._stops:
            text = self._text_of(self._token_ids)
            self._stop_at = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        return self._stop_at is not None

    def text(self) -> str:
        """The answer up to its stop string."""
        return self._text_of(self._token_ids)[: self._stop_at]

    def shown_prompt(self) -> str:
        """The prompt as text."""
        return self._tokenizer.decode(self.prompt_ids) if self.prompt_text is None else self.prompt_text

    def known_ids(self, stop_token_ids: Collection[int]) -> list[int]:
        """Ids of prompt and text: those that were generated as far as the text is made of them, then the tokenizer's
        (the part of a token before a stop string that starts within it)."""
        text = self.text()
        token_ids = self._token_ids[:-1] if self._token_ids[-1] in stop_token_ids else self._token_ids
        while not text.startswith(known := self._text_of(token_ids)):
            token_ids = token_ids[:-1]
        return [*self.prompt_ids, *token_ids, *self._tokenizer.encode_continuation(text[len(known) :])]

    def _text_of(self, token_ids: list[int]) -> str:
        context = self.prompt_ids[-CONTEXT_TOKENS:]
        head, text = self._tokenizer.decode(context), self._tokenizer.decode(context + token_ids)
        if not text.startswith(head):  # the prompt ends within a character
            return self._tokenizer.decode(token_ids)
        return text[len(head) :]


_live: weakref.WeakSet[Pipeline] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """The interpreter must not end under an engine's thread that is in native code, which would abort the process; and
    what was accepted for saving is to be there the next time."""
    for pipe in list(_live):
        pipe._end()


class Pipeline:
    """Answers prompts, as MII's pipeline does; conversations that come back are restored. Any thread may call."""

    def __init__(self, opened: OpenedService) -> None:
        """Takes the service over."""
        self._opened = opened
        self._tokenizer = opened.tokenizer
        self._texts = opened.state.transcripts
        self._tenant = b"pipeline\0" + opened.tokenizer.fingerprint()
        self._numbers = itertools.count()
        self._pid = os.getpid()
        _live.add(self)

    def __call__(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        stream: bool = False,
        ignore_eos: bool = False,
        return_full_text: bool = False,
        do_sample: bool = True,
        top_p: float = 0.9,
        top_k: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Response]:
        """Answer prompts (texts or token ids) side by side; responses in their order. Blocks until all are done.

        The names are MII's, plus `seed`. `max_length` bounds prompt and answer together and takes precedence over
        `max_new_tokens`; without either an answer may fill the context. An answer ends before the first stop string.
        Raises RequestError for what cannot be served.
        """
        if stream:
            raise RequestError("stream is not supported here: use the server, or stream=False", param="stream")
        if min_new_tokens:
            raise RequestError(f"min_new_tokens is not supported, got {min_new_tokens}", param="min_new_tokens")
        stops = [stop] if isinstance(stop, str) else list(stop)
        if "" in stops:
            raise RequestError("a stop string must not be empty", param="stop")
        stop_token_ids = frozenset() if ignore_eos else self._tokenizer.stop_token_ids
        answers = [_Answer(self._tokenizer, *self._encode(prompt), stops) for prompt in _as_list(prompts)]
        sampling = [
            SamplingParams(
                max_new_tokens=self._num_new(len(answer.prompt_ids), max_length, max_new_tokens),
                temperature=0.0 if not do_sample else 1.0 if temperature is None else temperature,
                top_p=top_p,
                top_k=top_k or 0,
                seed=seed,
                stop_token_ids=stop_token_ids,
            )
            for answer in answers
        ]
        responses = []
        for answer, result in zip(answers, self._generate(answers, sampling), strict=True):
            text = answer.text()
            if answer.prompt_text is not None and text:
                self._texts.remember(self._tenant, answer.prompt_text + text, answer.known_ids(stop_token_ids))
            responses.append(
                Response(
                    generated_text=answer.shown_prompt() + text if return_full_text else text,
                    prompt_length=len(answer.prompt_ids),
                    generated_length=len(result.token_ids),
                    finish_reason=result.finish_reason,
                    hcache=result.report,
                )
            )
        return responses

    def destroy(self) -> None:
        """Finish what runs, make saved state durable, release the state directory. Idempotent; after a rank of several
        was lost it returns within seconds. A pipeline that lives when the interpreter ends is destroyed then, and what
        runs on it is cancelled."""
        _live.discard(self)
        self._opened.close()

    def _end(self) -> None:
        """The interpreter ends, in the process that opened this or in one that it forked."""
        if os.getpid() == self._pid:
            self._opened.close(drain=False)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.destroy()

    def _encode(self, prompt: str | Sequence[int]) -> tuple[list[int], str | None]:
        """Token ids and, of a text, the text. What of it was an answer gets the ids that were generated."""
        if not isinstance(prompt, str):
            return list(prompt), None
        known = self._texts.longest_prefix(self._tenant, prompt)
        if known is None:
            return self._tokenizer.encode(prompt, add_special_tokens=True), prompt
        return known[1] + self._tokenizer.encode_continuation(prompt[known[0] :]), prompt

    def _num_new(self, num_prompt: int, max_length: int | None, max_new_tokens: int | None) -> int:
        """Tokens that an answer may have."""
        context = self._opened.service.max_context_tokens
        limit = context if max_length is None else min(max_length, context)
        if num_prompt >= limit:
            message = f"the prompt has {num_prompt} tokens, prompt and answer together may have {limit}"
            raise RequestError(message, param="max_length", code="context_length_exceeded")
        return limit - num_prompt if max_new_tokens is None else min(max_new_tokens, limit - num_prompt)

    def _generate(self, answers: list[_Answer], sampling: list[SamplingParams]) -> list[GenerationResult]:
        """All at once; when one fails the others are cancelled."""
        request_ids = [f"pipe-{next(self._numbers)}" for _ in answers]
        try:
            for request_id, answer, params in zip(request_ids, answers, sampling, strict=True):
                self._opened.service.submit(
                    GenerationRequest(
                        request_id=request_id,
                        prompt_token_ids=answer.prompt_ids,
                        sampling=params,
                        on_token=answer.push,
                        on_finish=answer.future.set_result,
                    )
                )
            results = [answer.future.result() for answer in answers]
            for error in filter(None, (result.error for result in results)):
                raise error
        except BaseException:  # KeyboardInterrupt too: nobody waits for the rest
            for request_id in request_ids:
                self._opened.service.cancel(request_id)
            raise
        return results


def _as_list(prompts: Any) -> list[str | Sequence[int]]:
    """One prompt or several, texts or token ids, as a list of prompts."""
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    listed = [prompts] if is_one else list(prompts)
    if not all(isinstance(item, str) or all(isinstance(token_id, int) for token_id in item) for item in listed):
        raise RequestError("prompts must be a text, a list of texts, token ids, or a list of those", param="prompts")
    return listed


def pipeline(
    model: str | PathLike[str] | None = None,
    *,
    model_name_or_path: str | PathLike[str] | None = None,
    **settings: Any,
) -> Pipeline:
    """Load a model into the ragged engine, with its saved state. Blocks until it can answer.

    model: directory or hub id of a checkpoint (`model_name_or_path` is MII's name for it); None makes a small random
    demo model. settings: fields of HCacheConfig; `tensor_parallel=N` splits the model over N processes, which end with
    this one or with `destroy`. When one of them dies before, requests raise HCacheError with the reason, and the
    pipeline is of no use any more. Raises ConfigError for a setting that is not one of them, UnsupportedModelError,
    StateDirBusyError.
    """
    if model is not None and model_name_or_path not in (None, model):
        raise ConfigError(f"model is {str(model)!r} and model_name_or_path {str(model_name_or_path)!r}: give one")
    chosen = model if model is not None else model_name_or_path
    config = HCacheConfig.from_dict({**settings, "model": None if chosen is None else str(chosen)})

    from mii_hcache.engine.open import open_service  # not above: the import must stay light

    opened = open_service(config, progress=_tell_of_measuring)
    for note in opened.notes:
        _log.info(note)
    return Pipeline(opened)


def _tell_of_measuring(what: str, num_done: int, num_all: int) -> None:
    """The one thing that a caller would wonder about: seconds, once for a model and a machine."""
    if what.startswith("measuring"):
        print(f"mii_hcache: {what}", file=sys.stderr, flush=True)
