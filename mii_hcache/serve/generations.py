"""From the engine's thread to the event loop: the answers to one HTTP request while they are generated."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from mii_hcache.engine.tokenizer import Tokenizer
from mii_hcache.errors import HCacheError, QueueFullError, RequestError
from mii_hcache.runtime.generation import FinishReason, GenerationResult, GenerationService, SamplingParams
from mii_hcache.serve.errors import engine_failed, shutting_down
from mii_hcache.serve.growing import End, GrowingAnswer, Piece, ShownPrompt, Wanted
from mii_hcache.serve.logprobs import Scored
from mii_hcache.serve.text import EncodedPrompt, PromptEncoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of an answer."""

    answer_idx: int
    prompt: EncodedPrompt
    result: GenerationResult
    text: str
    """All of the answer, the prompt not included."""
    last_piece: str
    """The end of `text` that no `Piece` carried."""
    finish_reason: str
    """OpenAI's word: `stop` or `length`."""
    num_tokens: int
    """Generated for the client."""
    echo: Piece | None = None
    """The prompt, when it is to be shown."""
    scored: Sequence[Scored] = ()
    """Tokens of `text`, when logprobs are wanted."""
    last_scored: Sequence[Scored] = ()
    """Those that no `Piece` carried."""
    token_ids: Sequence[int] | None = None
    """All that were generated, when they are wanted."""
    last_token_ids: Sequence[int] = ()
    """Those that no `Piece` carried."""


class _Place:
    """Where an answer stands. Event loop only."""

    def __init__(self, answer: GrowingAnswer) -> None:
        self.answer = answer
        self.num_shown_chars = 0
        """Of the answer, given to the consumer."""
        self.submitted = False
        self.cancelled = False
        self.ended = False


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
        shown: Sequence[ShownPrompt],
        sampling: Sequence[SamplingParams],
        wanted: Wanted,
        background: set[asyncio.Task[None]],
    ) -> None:
        """`shown`, `sampling`: one for each prompt. `background`: where tasks are kept that outlive the request; wait
        for them before the encoder's storage closes."""
        self._request_id = request_id
        self._service = service
        self._encoder = encoder
        self._wanted = wanted
        self._background = background
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | End] = asyncio.Queue()
        self._places = [
            _Place(
                GrowingAnswer(
                    idx,
                    prompt=prompt,
                    shown=shown[idx],
                    tokenizer=tokenizer,
                    sampling=sampling[idx],
                    wanted=wanted,
                    post=self._post,
                )
            )
            for idx, prompt in enumerate(prompts)
        ]

    @property
    def num_answers(self) -> int:
        """One for each prompt."""
        return len(self._places)

    def submit(self) -> None:
        """Hand every prompt to the engine, or none. Raises RequestError when one can never be served, QueueFullError
        when too many wait, ApiError (503) when the engine takes no more."""
        try:
            for idx, place in enumerate(self._places):
                if self._wanted.echo and self._wanted.pieces and not self._wanted.logprobs:
                    self._events.put_nowait(place.answer.echo())
                self._service.submit(place.answer.request(f"{self._request_id}-{idx}"))
                place.submitted = True
        except (RequestError, QueueFullError):
            self.close()
            raise
        except HCacheError as error:
            self.close()
            raise (shutting_down() if getattr(self._service, "is_alive", True) else engine_failed()) from error

    async def events(self) -> AsyncIterator[Piece | Finished]:
        """Pieces as they come, and for each answer its end. Raises what made an answer fail; then the others are
        cancelled. To be iterated once, after `submit`."""
        try:
            while not all(place.ended for place in self._places):
                event = await self._events.get()
                if isinstance(event, Piece):
                    if not event.is_prompt:
                        self._places[event.answer_idx].num_shown_chars += len(event.text)
                    yield event
                    continue
                place = self._places[event.answer.answer_idx]
                place.ended = True
                _raise_failure(event)
                place.num_shown_chars += len(event.last_piece)
                await self._remember(event)
                yield self._finished(event)
        finally:
            self.close()

    def close(self) -> None:
        """Cancel what has been submitted and not ended. Idempotent."""
        running = [place for place in self._places if place.submitted and not place.ended and not place.cancelled]
        for place in running:
            place.cancelled = True
            self._service.cancel(f"{self._request_id}-{place.answer.answer_idx}")
        if running:
            task = self._loop.create_task(self._remember_cancelled(running))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    def _finished(self, end: End) -> Finished:
        answer, wanted = end.answer, self._wanted
        scored = answer.scored[: answer.text.num_shown_tokens] if wanted.logprobs else ()
        token_ids = None if not wanted.token_ids else () if wanted.nothing_new else end.result.token_ids
        return Finished(
            answer_idx=answer.answer_idx,
            prompt=answer.prompt,
            result=end.result,
            text=answer.text.text,
            last_piece=end.last_piece,
            finish_reason="length" if wanted.nothing_new or _ran_out(end) else "stop",
            num_tokens=0 if wanted.nothing_new else len(end.result.token_ids),
            echo=answer.echo() if wanted.echo else None,
            scored=scored,
            last_scored=scored[end.num_told :],
            token_ids=token_ids,
            last_token_ids=() if token_ids is None else token_ids[end.num_told_ids :],
        )

    def _post(self, event: Piece | End) -> None:
        """From the engine thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server was forced down, nobody waits
            _log.debug("event of %s dropped after the end of the server", self._request_id)

    async def _remember_cancelled(self, running: list[_Place]) -> None:
        while not all(place.ended for place in running):
            event = await self._events.get()
            if isinstance(event, Piece):
                continue  # not shown to anybody
            place = self._places[event.answer.answer_idx]
            place.ended = True
            if event.answer.failure is None:
                event.answer.text.cut(place.num_shown_chars)
                await self._remember(event)

    async def _remember(self, end: End) -> None:
        """Before the client learns of the end: its next turn may follow at once. Failing costs a later hit, not this
        answer."""
        answer = end.answer
        try:
            await asyncio.to_thread(self._encoder.remember, answer.prompt, answer.text, end.result.token_ids)
        except Exception:
            _log.exception("the answer to %s was not remembered; its next turn will be prefilled", self._request_id)


def _ran_out(end: End) -> bool:
    return end.result.finish_reason is FinishReason.LENGTH and not end.answer.text.stopped


def _raise_failure(end: End) -> None:
    if end.answer.failure is not None:
        raise end.answer.failure
    if end.result.finish_reason is FinishReason.ERROR:
        raise end.result.error or HCacheError("the engine failed")
    if end.result.finish_reason is FinishReason.CANCELLED:
        raise shutting_down()  # nobody else cancels an answer that is still waited for
