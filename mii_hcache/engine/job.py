"""One generation on its way through the scheduler."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from mii.batching.data_classes import Request

from mii_hcache.core.identity import SpanId, spans_of
from mii_hcache.errors import HCacheError
from mii_hcache.runtime.generation import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    RestoreReport,
    TokenLogprob,
)


@dataclass(eq=False, kw_only=True)
class Job:
    """A request and everything that has become of it. Engine thread only."""

    request: GenerationRequest
    seed: bytes
    """Root of the tenant's span chain."""
    order: int
    """Submission order: the oldest is never preempted by a younger one."""
    token_ids: list[int]
    """Prompt, then generated tokens. All but the last are (or will be) in the blocks."""
    submitted_s: float = field(default_factory=time.perf_counter)
    admitted_s: float = 0.0
    uid: int | None = None
    """The engine's sequence, while it has one."""
    report: RestoreReport = field(default_factory=RestoreReport)
    finish_reason: FinishReason | None = None
    error: HCacheError | None = None
    is_cancelled: bool = False
    is_poisoned: bool = False
    """Its logits were not finite: neither its blocks nor what was saved of it can be trusted."""
    generator: torch.Generator | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """Grows while the prompt runs, when they were asked for."""
    _spans: list[tuple[SpanId, bytes]] = field(default_factory=list)
    _num_named: int = 0

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt must be run whole, for its logits."""
        return self.request.on_prompt_logprobs is not None and self.num_generated == 0

    def spans(self) -> list[tuple[SpanId, bytes]]:
        """Whole spans of the tokens so far: id and packed token ids."""
        if self._num_named != len(self.token_ids):
            self._spans = list(spans_of(self.seed, self.token_ids))
            self._num_named = len(self.token_ids)
        return self._spans

    def span_ids(self) -> list[SpanId]:
        """Ids of `spans`."""
        return [span_id for span_id, _ in self.spans()]

    def accept(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Take a generated token; sets `finish_reason` when it is the last."""
        if self.num_generated == 0:
            self.report.ttft_ms = 1e3 * (time.perf_counter() - self.submitted_s)
            if self.request.on_prompt_logprobs is not None:
                self.request.on_prompt_logprobs(self.prompt_logprobs)
        self.token_ids.append(token_id)
        if logprob is not None and self.request.on_logprob is not None:
            self.request.on_logprob(logprob)
        sampling = self.request.sampling
        wants_stop = self.request.on_token(token_id)
        if wants_stop or token_id in sampling.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif self.num_generated >= sampling.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        elif self.is_cancelled:
            self.finish_reason = FinishReason.CANCELLED

    def fail(self, error: HCacheError) -> None:
        """End with an error."""
        self.error = error
        self.finish_reason = FinishReason.ERROR

    def result(self) -> GenerationResult:
        """What the caller gets. Call once `finish_reason` is set."""
        assert self.finish_reason is not None
        return GenerationResult(
            finish_reason=self.finish_reason,
            token_ids=tuple(self.token_ids[self.num_prompt :]),
            report=self.report,
            error=self.error,
        )


@dataclass(eq=False)
class JobRequest(Request):  # type: ignore[misc]
    """MII's view of a job. The job decides when it ends; MII only batches.

    A restored job looks like a prompt of which a first part was processed already, which is how MII keeps the rest of
    a prompt that it has split.
    """

    job: Any = None
    logprob: TokenLogprob | None = None
    """Of the next token, when it was asked for."""

    @classmethod
    def of(cls, job: Job, num_present: int) -> JobRequest:
        """A job whose first `num_present` tokens are in the blocks of `job.uid`."""
        tokens = torch.tensor(job.token_ids, dtype=torch.int64)
        return cls(
            tid=0,
            uid=job.uid,
            input_tokens=tokens[num_present:],
            prompt_tokens=tokens,
            seq_length=num_present,
            last_in_prompt=True,
            post_processing=[],
            generate_params=None,
            job=job,
        )

    @property
    def stop_generation(self) -> bool:
        return self.job.finish_reason is not None

    @property
    def max_length(self) -> int:
        return 1 << 62  # the service has checked that prompt and answer fit

    @property
    def stream(self) -> bool:
        return True

    def accumulate_generated_token(self) -> None:
        """The job keeps its own tokens: MII's list is lost on preemption."""
