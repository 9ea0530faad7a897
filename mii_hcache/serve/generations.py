"""From the engine's thread to the event loop: the answers to one HTTP request while they are generated."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from mii_hcache.engine.tokenizer import Tokenizer
from mii_hcache.errors import HCacheError, RequestError
from mii_hcache.runtime.generation import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    GenerationService,
    SamplingParams,
)
from mii_hcache.serve.answer import CONTEXT_TOKENS, AnswerText
from mii_hcache.serve.errors import shutting_down
from mii_hcache.serve.text import EncodedPrompt, PromptEncoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that an answer grew by."""

    answer_idx: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of an answer."""

    answer_idx: int
    prompt: EncodedPrompt
    result: GenerationResult
    text: str
    """All of the answer."""
    last_piece: str
    """The end of `text` that no `Piece` carried."""
    finish_reason: str
    """OpenAI's word: `stop` or `length`."""


class _Answer:
    """One prompt's answer. The engine thread alone touches `text` until the end has been posted."""

    def __init__(self, answer_idx: int, prompt: EncodedPrompt, text: AnswerText) -> None:
        self.answer_idx = answer_idx
        self.prompt = prompt
        self.text = text
        self.num_shown_chars = 0
        """What the consumer was given. Event loop only."""
        self.submitted = False
        self.cancelled = False
        self.ended = False
        self.failure: Exception | None = None


class Generations:
    """The answers to a request's prompts, generated side by side.

    Belongs to the event loop that makes it. When its consumer stops early (the client has gone), what still runs is
    cancelled, and what the client was shown is remembered all the same: it may well send that again.
    """

    def __init__(
        self,
        *,
        request_id: str,
        service: GenerationService,
        encoder: PromptEncoder,
        tokenizer: Tokenizer,
        prompts: Sequence[EncodedPrompt],
        sampling: Sequence[SamplingParams],
        stops: Sequence[str],
        want_pieces: bool,
        background: set[asyncio.Task[None]],
    ) -> None:
        """`sampling`: one for each prompt. `want_pieces`: else only the ends of answers are told. `background`: where
        tasks are kept that outlive the request; wait for them before the encoder's storage closes."""
        self._request_id = request_id
        self._service = service
        self._encoder = encoder
        self._sampling = sampling
        self._want_pieces = want_pieces
        self._background = background
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | tuple[_Answer, GenerationResult, str]] = asyncio.Queue()
        self._answers = [
            _Answer(
                idx,
                prompt,
                AnswerText(tokenizer.decode, context=prompt.token_ids[-CONTEXT_TOKENS:], stops=stops),
            )
            for idx, prompt in enumerate(prompts)
        ]

    @property
    def num_answers(self) -> int:
        """One for each prompt."""
        return len(self._answers)

    def submit(self) -> None:
        """Hand every prompt to the engine, or none. Raises RequestError when one can never be served, ApiError (503)
        when the engine takes no more."""
        try:
            for answer in self._answers:
                self._service.submit(self._request_for(answer))
                answer.submitted = True
        except RequestError:
            self.close()
            raise
        except HCacheError as error:
            self.close()
            raise shutting_down() from error

    async def events(self) -> AsyncIterator[Piece | Finished]:
        """Pieces as they come, and for each answer its end. Raises what made an answer fail; then the others are
        cancelled. To be iterated once, after `submit`."""
        try:
            while not all(answer.ended for answer in self._answers):
                event = await self._events.get()
                if isinstance(event, Piece):
                    self._answers[event.answer_idx].num_shown_chars += len(event.text)
                    yield event
                    continue
                answer, result, last_piece = event
                answer.ended = True
                _raise_failure(answer, result)
                answer.num_shown_chars += len(last_piece)
                await self._remember(answer, result)
                yield Finished(
                    answer_idx=answer.answer_idx,
                    prompt=answer.prompt,
                    result=result,
                    text=answer.text.text,
                    last_piece=last_piece,
                    finish_reason="length" if _ran_out(answer, result) else "stop",
                )
        finally:
            self.close()

    def close(self) -> None:
        """Cancel what has been submitted and not ended. Idempotent."""
        running = [answer for answer in self._answers if answer.submitted and not answer.ended and not answer.cancelled]
        for answer in running:
            answer.cancelled = True
            self._service.cancel(f"{self._request_id}-{answer.answer_idx}")
        if running:
            task = self._loop.create_task(self._remember_cancelled(running))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    def _request_for(self, answer: _Answer) -> GenerationRequest:
        sampling = self._sampling[answer.answer_idx]

        def on_token(token_id: int) -> bool:
            if token_id in sampling.stop_token_ids:
                return False  # not part of the text; the engine ends by itself
            try:
                piece = answer.text.push(token_id)
            except Exception as error:  # must not reach the engine: it ends this answer only
                answer.failure = error
                return True
            if piece and self._want_pieces:
                self._post(Piece(answer_idx=answer.answer_idx, text=piece))
            return answer.text.stopped

        def on_finish(result: GenerationResult) -> None:
            last_piece = ""
            try:
                if answer.failure is None:
                    last_piece = answer.text.finish()
            except Exception as error:
                answer.failure = error
            self._post((answer, result, last_piece))

        return GenerationRequest(
            request_id=f"{self._request_id}-{answer.answer_idx}",
            prompt_token_ids=answer.prompt.token_ids,
            sampling=sampling,
            on_token=on_token,
            on_finish=on_finish,
            tenant_salt=answer.prompt.tenant,
            miss_hint=answer.prompt.miss_hint,
        )

    def _post(self, event: Piece | tuple[_Answer, GenerationResult, str]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server was forced down, nobody waits
            _log.debug("event of %s dropped after the end of the server", self._request_id)

    async def _remember_cancelled(self, running: list[_Answer]) -> None:
        while not all(answer.ended for answer in running):
            event = await self._events.get()
            if isinstance(event, Piece):
                continue  # not shown to anybody
            answer, result, _ = event
            answer.ended = True
            if answer.failure is None:
                answer.text.cut(answer.num_shown_chars)
                await self._remember(answer, result)

    async def _remember(self, answer: _Answer, result: GenerationResult) -> None:
        """Before the client learns of the end: its next turn may follow at once. Failing costs a later hit, not this
        answer."""
        try:
            await asyncio.to_thread(self._encoder.remember, answer.prompt, answer.text, result.token_ids)
        except Exception:
            _log.exception("the answer to %s was not remembered; its next turn will be prefilled", self._request_id)


def _ran_out(answer: _Answer, result: GenerationResult) -> bool:
    return result.finish_reason is FinishReason.LENGTH and not answer.text.stopped


def _raise_failure(answer: _Answer, result: GenerationResult) -> None:
    if answer.failure is not None:
        raise answer.failure
    if result.finish_reason is FinishReason.ERROR:
        raise result.error or HCacheError("the engine failed")
    if result.finish_reason is FinishReason.CANCELLED:
        raise shutting_down()  # nobody else cancels an answer that is still waited for
