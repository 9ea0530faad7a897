"""One prompt's answer while the engine makes it, told piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mii_hcache.engine.tokenizer import Tokenizer
from mii_hcache.runtime.generation import GenerationRequest, GenerationResult, SamplingParams, TokenLogprob
from mii_hcache.serve.answer import CONTEXT_TOKENS, AnswerText
from mii_hcache.serve.logprobs import Scored, offsets_of
from mii_hcache.serve.text import EncodedPrompt


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a client wants to see of its answers."""

    stops: Sequence[str] = ()
    pieces: bool = False
    """Else only the ends of answers are told."""
    echo: bool = False
    """The prompt is shown first, as if it were a part of the answer."""
    num_top_logprobs: int | None = None
    """None: no logprobs."""
    token_ids: bool = False
    """Tell which tokens were generated; a piece for each, also when it adds no text."""
    nothing_new: bool = False
    """What is generated is dropped (an engine generates at least one token)."""

    @property
    def logprobs(self) -> bool:
        """Whether tokens are scored."""
        return self.num_top_logprobs is not None


@dataclass(frozen=True, kw_only=True)
class ShownPrompt:
    """A prompt as a reader sees it."""

    text: str
    offsets: Sequence[int]
    """Of each token, when prompts are echoed with logprobs."""

    @classmethod
    def of(cls, prompt: EncodedPrompt, tokenizer: Tokenizer, wanted: Wanted) -> ShownPrompt:
        """Takes a while for a long prompt: not for the event loop."""
        if not wanted.echo and not wanted.logprobs:
            return cls(text="", offsets=())
        text = tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text
        offsets = offsets_of(tokenizer.decode, prompt.token_ids) if wanted.echo and wanted.logprobs else []
        return cls(text=text, offsets=offsets)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that an answer grew by."""

    answer_idx: int
    text: str
    scored: Sequence[Scored] = ()
    """Tokens that are seen for the first time, when logprobs are wanted."""
    token_ids: Sequence[int] = ()
    """Generated since the last piece, when they are wanted: ahead of the text where that is held back."""
    is_prompt: bool = False
    """The echo."""


@dataclass(frozen=True, kw_only=True)
class End:
    """The engine is done with an answer."""

    answer: GrowingAnswer
    result: GenerationResult
    last_piece: str
    """The end of the text that no `Piece` carried."""
    num_told: int
    """Scored tokens that a `Piece` carried."""
    num_told_ids: int
    """Token ids that a `Piece` carried."""


class GrowingAnswer:
    """Takes the engine's callbacks for one prompt and tells what comes of them through `post`.

    The engine thread alone touches `text` and `scored` until `End` has been posted. Nothing is raised into the engine:
    what goes wrong ends this answer and is kept in `failure`.
    """

    def __init__(
        self,
        answer_idx: int,
        *,
        prompt: EncodedPrompt,
        shown: ShownPrompt,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        wanted: Wanted,
        post: Callable[[Piece | End], None],
    ) -> None:
        """`post` is called on the engine thread."""
        self.answer_idx = answer_idx
        self.prompt = prompt
        self.shown_prompt = shown
        self.sampling = sampling
        self.text = AnswerText(tokenizer.decode, context=prompt.token_ids[-CONTEXT_TOKENS:], stops=wanted.stops)
        self.prompt_scored: list[Scored] = []
        """Of the echo."""
        self.scored: list[Scored] = []
        """Of the answer, beyond its end if it was cut at a stop string."""
        self.failure: Exception | None = None
        self._wanted = wanted
        self._post = post
        self._num_told = self._num_told_ids = 0
        self._logprob: TokenLogprob | None = None
        """Of the token that comes next."""

    def request(self, request_id: str) -> GenerationRequest:
        """What to submit."""
        wanted = self._wanted
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=self.prompt.token_ids,
            sampling=self.sampling,
            on_token=self._on_token,
            on_finish=self._on_finish,
            num_top_logprobs=wanted.num_top_logprobs,
            on_logprob=self._on_logprob if wanted.logprobs else None,
            on_prompt_logprobs=self._on_prompt_logprobs if wanted.logprobs and wanted.echo else None,
            tenant_salt=self.prompt.tenant,
            miss_hint=self.prompt.miss_hint,
        )

    def echo(self) -> Piece:
        """The prompt, as the first piece."""
        return Piece(answer_idx=self.answer_idx, text=self.shown_prompt.text, scored=self.prompt_scored, is_prompt=True)

    # --- engine thread ------------------------------------------------------------------------------------------

    def _on_prompt_logprobs(self, logprobs: Sequence[TokenLogprob | None]) -> None:
        self.prompt_scored = list(map(Scored, self.prompt.token_ids, self.shown_prompt.offsets, logprobs))
        if self._wanted.pieces:
            self._post(self.echo())

    def _on_logprob(self, logprob: TokenLogprob) -> None:
        self._logprob = logprob

    def _on_token(self, token_id: int) -> bool:
        if token_id in self.sampling.stop_token_ids or self._wanted.nothing_new:
            return False  # not part of the text; the engine ends by itself
        try:
            if self._wanted.logprobs:
                offset = len(self.shown_prompt.text) + self.text.num_chars
                self.scored.append(Scored(token_id, offset, self._logprob))
            piece = self.text.push(token_id)
        except Exception as error:  # must not reach the engine: it ends this answer only
            self.failure = error
            return True
        if self._wanted.pieces and (piece or self._wanted.token_ids):
            token_ids = (token_id,) if self._wanted.token_ids else ()
            self._num_told_ids += len(token_ids)
            scored = self._newly_seen() if piece else ()
            self._post(Piece(answer_idx=self.answer_idx, text=piece, scored=scored, token_ids=token_ids))
        return self.text.stopped

    def _on_finish(self, result: GenerationResult) -> None:
        last_piece = ""
        try:
            if self.failure is None:
                last_piece = self.text.finish()
        except Exception as error:
            self.failure = error
        self._post(
            End(
                answer=self,
                result=result,
                last_piece=last_piece,
                num_told=self._num_told,
                num_told_ids=self._num_told_ids,
            )
        )

    def _newly_seen(self) -> Sequence[Scored]:
        if not self._wanted.logprobs:
            return ()
        start, self._num_told = self._num_told, self.text.num_shown_tokens
        return self.scored[start : self._num_told]
