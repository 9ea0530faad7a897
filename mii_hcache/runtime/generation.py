"""A generation request and its result: the words that servers and engines exchange."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Protocol

from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.errors import ConfigError, HCacheError


class FinishReason(str, Enum):
    """Why a generation ended."""

    STOP = "stop"
    """A stop token, or `on_token` asked for it."""
    LENGTH = "length"
    """`max_new_tokens` or the context limit."""
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    seed: int | None = None
    """Same seed, prompt and model: same tokens, whatever else is in the batch (up to numeric near-ties)."""
    stop_token_ids: frozenset[int] = frozenset()
    """The stop token itself is generated and reported, then generation ends. Leave empty to ignore EOS."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be >= 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be >= 0, got {self.top_k}")


@dataclass(kw_only=True)
class RestoreReport:
    """Where a prompt's tokens came from. The server answers with it under `hcache`."""

    resident_tokens: int = 0
    """Prompt tokens whose K and V were still in GPU memory."""
    restored_tokens: int = 0
    """Prompt tokens brought back from saved state."""
    recomputed_tokens: int = 0
    """Prompt tokens that the plan of a restore had computed again while the others were read."""
    restored_from: str | None = None
    """Tier the restored chunks came from: `memory`, `file`, or both joined by `+`."""
    method: str | None = None
    """How the restored tokens' layers came back: `hidden`, `kv`, `recompute`, joined by `+`; None when none did."""
    restore_ms: float = 0.0
    """From admission to the last layer of the last span."""
    planned_ms: float | None = None
    """What the plan expected of a restore that has the machine to itself; None where the method does not plan."""
    prefill_tokens: int = 0
    """Prompt tokens run through the model."""
    ttft_ms: float | None = None
    """From submission to the first token."""
    miss_reason: str | None = None
    """Why saved state was not used, or not as far as it could have been; None when nothing is amiss."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not prefilled."""
        return self.resident_tokens + self.restored_tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, milliseconds rounded to microseconds."""
        values = asdict(self)
        for name in ("restore_ms", "planned_ms", "ttft_ms"):
            if values[name] is not None:
                values[name] = round(values[name], 3)
        return values


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """How likely a token was, by the model's own logits (before temperature, top-k and top-p)."""

    token_id: int
    logprob: float
    """Natural logarithm."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at that place with their logprobs, best first."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """How a generation ended."""

    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    """Every generated token, the stop token included."""
    report: RestoreReport
    error: HCacheError | None = None
    """Set when `finish_reason` is ERROR."""


def _ignore_token(token_id: int) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt to continue. Callbacks run on the engine thread and must not block or raise."""

    request_id: str
    """Unique among running requests."""
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    on_finish: Callable[[GenerationResult], None]
    """Called exactly once, last."""
    on_token: Callable[[int], bool] = field(default=_ignore_token)
    """Called for each generated token in order; True ends the generation there (a stop string is complete)."""
    num_top_logprobs: int | None = None
    """Likeliest tokens to report with each logprob; needed (0 will do) for either of the next two to be called."""
    on_logprob: Callable[[TokenLogprob], None] | None = None
    """Called for each generated token, just before `on_token`."""
    on_prompt_logprobs: Callable[[Sequence[TokenLogprob | None]], None] | None = None
    """Called once, before the first token, with an entry per prompt token (None for the first). Such a prompt is run
    whole: saved state gives no logits."""
    tenant_salt: bytes = b""
    """Requests with different salts never share saved or resident state."""
    miss_hint: str | None = None
    """Reported as `miss_reason` when saved state was not used as far as the caller expected (`text_changed`)."""


class GenerationService(Protocol):
    """What a server asks of an engine. Every method may be called from any thread."""

    @property
    def geometry(self) -> ModelGeometry: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context_tokens(self) -> int:
        """Most tokens (prompt + generated) that one sequence can ever hold here: the smaller of the model's limit and
        what the block pool holds."""
        ...

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises RequestError when it can never be served (empty or too long prompt, token id out of
        range), with the limits in the message; QueueFullError when too many wait. Everything later is told through
        `on_finish`."""
        ...

    def cancel(self, request_id: str) -> None:
        """End a request soon; its `on_finish` still comes (CANCELLED). Unknown ids are ignored."""
        ...

    def metrics(self) -> dict[str, float]:
        """Counters (`*_total`) and gauges by name, units in the names."""
        ...

    def close(self, *, drain: bool = True) -> None:
        """Finish running and queued requests (or cancel them when not `drain`), flush saved state, stop. Idempotent."""
        ...
