"""What the OpenAI routes do: a body becomes prompts, prompts become answers, answers a reply or a stream of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mii_hcache.engine.tokenizer import Tokenizer
from mii_hcache.errors import RequestError
from mii_hcache.runtime.generation import GenerationService, SamplingParams
from mii_hcache.serve.body import MAX_BODY_BYTES, read_body
from mii_hcache.serve.errors import ApiError, ClientGoneError, api_error_of, shutting_down, unknown_model
from mii_hcache.serve.gate import TENANT
from mii_hcache.serve.generations import Finished, Generations
from mii_hcache.serve.growing import Piece, ShownPrompt, Wanted
from mii_hcache.serve.keys import ANYBODY, Tenant
from mii_hcache.serve.logprobs import LogprobsJson, chat_logprobs, completion_logprobs
from mii_hcache.serve.metrics import ServerMetrics
from mii_hcache.serve.openai_schema import DEFAULT_COMPLETION_TOKENS, ChatBody, CompletionBody, GenerationBody, Prompt
from mii_hcache.serve.replies import Replies, sse
from mii_hcache.serve.request_log import NOTE, RequestNote
from mii_hcache.serve.text import EncodedPrompt, KnownTexts, PromptEncoder
from mii_hcache.serve.token_names import TokenNames

BodyT = TypeVar("BodyT", bound=GenerationBody)
ResultT = TypeVar("ResultT")

_DEFAULT_TEMPERATURE = 1.0
_LEAST_TEMPERATURE = 1e-5
"""Below it, logits divided by it are no numbers any more; greedy is what is meant."""
_LEAST_TOP_P = 1e-6
"""It keeps the likeliest token alone, as anything below would."""
_SCORED_IN_PLACE = 64
"""Logprobs of more tokens (an echoed prompt) are written on another thread."""


class Answering:
    """Answers completion and chat requests. Lives on one event loop; the service runs on a thread of its own."""

    def __init__(
        self,
        *,
        service: GenerationService,
        tokenizer: Tokenizer,
        known_texts: KnownTexts,
        model_name: str,
        metrics: ServerMetrics,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self.model_name = model_name
        self.draining = False
        """Set when the server is told to stop: no new work, what runs goes on."""
        self._service = service
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer, known_texts)
        self._names = TokenNames(tokenizer)
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._background: set[asyncio.Task[None]] = set()

    @property
    def max_context_tokens(self) -> int:
        """The service's."""
        return self._service.max_context_tokens

    @property
    def engine_is_alive(self) -> bool:
        """Whether there is somebody to answer."""
        return bool(getattr(self._service, "is_alive", True))

    @property
    def ranks(self) -> dict[str, str]:
        """What each process of a model over several does; empty for others."""
        states: Mapping[int, str] = getattr(self._service, "rank_states", {})
        return {str(rank): state for rank, state in states.items()}

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        body = await self._read(request, CompletionBody)
        tenant = _salt(request, body)

        def encode(prompt: Prompt) -> EncodedPrompt:
            if isinstance(prompt, str):
                return self._encoder.encode_text(prompt, tenant=tenant)
            if not all(0 <= token_id < self._service.vocab_size for token_id in prompt):
                raise RequestError(f"token ids must be in [0, {self._service.vocab_size})", param="prompt")
            return self._encoder.take_ids(prompt, tenant=tenant)

        prompts = await asyncio.to_thread(lambda: [encode(prompt) for prompt in body.prompt])
        return await self._answer(request, body, prompts, default_tokens=DEFAULT_COMPLETION_TOKENS)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body = await self._read(request, ChatBody)
        turns = [message.turn() for message in body.messages]
        prompt = await asyncio.to_thread(self._encoder.encode_chat, turns, tenant=_salt(request, body))
        return await self._answer(request, body, [prompt], default_tokens=None)

    async def wait_for_cancelled(self) -> None:
        """Until the answers whose clients went away have ended and are remembered."""
        if self._background:
            await asyncio.wait(set(self._background))

    async def _read(self, request: Request, model: type[BodyT]) -> BodyT:
        if self.draining:
            raise shutting_down()
        body = await read_body(request, model, max_bytes=self._max_body_bytes)
        if body.model is not None and body.model != self.model_name:
            raise unknown_model(body.model, self.model_name)
        return body

    async def _answer(
        self, request: Request, body: GenerationBody, prompts: Sequence[EncodedPrompt], *, default_tokens: int | None
    ) -> Response:
        """`default_tokens`: what an answer may have when the client does not say; None: what the context has room
        for."""
        wanted = Wanted(
            stops=body.stop,
            pieces=bool(body.stream),
            echo=isinstance(body, CompletionBody) and bool(body.echo),
            num_top_logprobs=body.num_top_logprobs,
            token_ids=bool(body.return_token_ids),
            nothing_new=body.num_answer_tokens == 0,
        )
        replies = Replies(
            chat=isinstance(body, ChatBody),
            model=self.model_name,
            with_usage=body.include_usage,
            logprobs=self._logprobs_json(body),
            prompt_ids=[prompt.token_ids for prompt in prompts] if wanted.token_ids else None,
        )
        sampling = [self._sampling(body, prompt, default_tokens) for prompt in prompts]
        generations = Generations(
            request_id=replies.request_id,
            service=self._service,
            encoder=self._encoder,
            tokenizer=self._tokenizer,
            prompts=prompts,
            shown=await self._shown(prompts, wanted),
            sampling=sampling,
            wanted=wanted,
            background=self._background,
        )
        note: RequestNote = request.scope.get(NOTE) or RequestNote()
        note.request_id, note.num_answers = replies.request_id, generations.num_answers
        generations.submit()
        if body.stream:
            return EventStream(self._stream(generations, replies, note), generations)
        finished = await _unless_gone(request, self._collect(generations, note))
        if wanted.logprobs:  # a row for each token: not on the event loop
            return await asyncio.to_thread(lambda: JSONResponse(replies.whole(finished)))
        return JSONResponse(replies.whole(finished))

    async def _shown(self, prompts: Sequence[EncodedPrompt], wanted: Wanted) -> list[ShownPrompt]:
        def shown() -> list[ShownPrompt]:
            return [ShownPrompt.of(prompt, self._tokenizer, wanted) for prompt in prompts]

        return await asyncio.to_thread(shown) if wanted.echo or wanted.logprobs else shown()

    def _logprobs_json(self, body: GenerationBody) -> LogprobsJson | None:
        if body.num_top_logprobs is None:
            return None
        form = chat_logprobs if isinstance(body, ChatBody) else completion_logprobs
        return form(self._names, body.num_top_logprobs)

    def _sampling(self, body: GenerationBody, prompt: EncodedPrompt, default_tokens: int | None) -> SamplingParams:
        num_tokens = body.num_answer_tokens
        room = self.max_context_tokens - len(prompt.token_ids)
        if room < (num_tokens or 1):
            raise self._too_long(body, prompt, num_tokens)
        if num_tokens is None:
            num_tokens = room if default_tokens is None else min(room, default_tokens)
        num_tokens = max(num_tokens, 1)  # for a prompt that is only scored, too
        stop_token_ids = frozenset(body.stop_token_ids or ())
        temperature = _DEFAULT_TEMPERATURE if body.temperature is None else body.temperature
        return SamplingParams(
            max_new_tokens=num_tokens,
            temperature=temperature if temperature >= _LEAST_TEMPERATURE else 0.0,
            top_p=1.0 if body.top_p is None else max(body.top_p, _LEAST_TOP_P),
            top_k=max(body.top_k or 0, 0),
            seed=body.seed,
            stop_token_ids=stop_token_ids if body.ignore_eos else stop_token_ids | self._tokenizer.stop_token_ids,
        )

    def _too_long(self, body: GenerationBody, prompt: EncodedPrompt, num_tokens: int | None) -> ApiError:
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        length = len(prompt.token_ids)
        asked = (
            f"your {param} resulted in {length} tokens"
            if num_tokens is None
            else (
                f"you requested {length + num_tokens} tokens ({length} in the {param}, {num_tokens} in the completion)"
            )
        )
        return ApiError(
            400,
            f"This model's maximum context length is {self.max_context_tokens} tokens. However, {asked}. "
            "Please reduce the length of either.",
            param=param,
            code="context_length_exceeded",
        )

    async def _collect(self, generations: Generations, note: RequestNote) -> list[Finished]:
        return [event async for event in self._noted(generations, note) if isinstance(event, Finished)]

    async def _noted(self, generations: Generations, note: RequestNote) -> AsyncIterator[Piece | Finished]:
        async for event in generations.events():
            if isinstance(event, Finished):
                note.finished.append(event)
                self._metrics.count_answer(event.result.report, event.num_tokens)
            yield event

    async def _stream(self, generations: Generations, replies: Replies, note: RequestNote) -> AsyncIterator[str]:
        opened: set[int] = set()
        finished: list[Finished] = []
        try:
            async for event in self._noted(generations, note):
                if event.answer_idx not in opened:
                    opened.add(event.answer_idx)
                    for chunk in replies.opening_chunks(event.answer_idx):
                        yield sse(chunk)
                if isinstance(event, Piece):
                    yield await _piece_event(replies, event)
                    continue
                finished.append(event)
                if event.last_piece or event.last_scored or event.last_token_ids:
                    last = Piece(
                        answer_idx=event.answer_idx,
                        text=event.last_piece,
                        scored=event.last_scored,
                        token_ids=event.last_token_ids,
                    )
                    yield await _piece_event(replies, last)
                for chunk in replies.closing_chunks(finished, num_answers=generations.num_answers):
                    yield sse(chunk)
        except Exception as error:  # the status is sent already: the error is an event
            yield sse(api_error_of(error).to_dict())
        yield sse("[DONE]")


class EventStream(StreamingResponse):
    """Server-sent events of running generations, which it cancels when it ends before them, however it ends."""

    def __init__(self, events: AsyncIterator[str], generations: Generations) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._generations = generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generations.close()


async def _piece_event(replies: Replies, piece: Piece) -> str:
    if len(piece.scored) <= _SCORED_IN_PLACE:
        return sse(replies.piece_chunk(piece))
    return await asyncio.to_thread(lambda: sse(replies.piece_chunk(piece)))


def _salt(request: Request, body: GenerationBody) -> bytes:
    tenant: Tenant = request.scope.get(TENANT, ANYBODY)
    return tenant.salt(body.cache_salt)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of `work`, which is cancelled when the client closes its connection (ClientGoneError)."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
