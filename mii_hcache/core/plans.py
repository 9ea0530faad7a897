"""The two plans: what is written while serving, and how a history of some length is brought back (paper section 4.1).

What is stored is fixed when it is saved; how much is recomputed is chosen for every request. `core/planner.py` makes
both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.layout import LayerKinds, SpanLayout
from mii_hcache.core.makespan import Timeline
from mii_hcache.errors import ConfigError

KindRuns = tuple[tuple[LayerKinds, int], ...]
"""How the spans of a history are stored, from its first: (kinds of the layers, number of spans in a row)."""


def runs_of(kinds_by_span: Iterable[LayerKinds]) -> KindRuns:
    """Equal neighbours as runs."""
    return tuple((kinds, sum(1 for _ in spans)) for kinds, spans in groupby(kinds_by_span))


@dataclass(frozen=True, kw_only=True)
class StoragePlan:
    """Which layers of a span are stored, and as what. A token-wise method stores spans in two patterns."""

    method: str
    kinds: LayerKinds
    other_kinds: LayerKinds | None = None
    other_share: float = 0.0
    """Share of spans, evenly spread, that are stored as `other_kinds`."""
    closed_form: float | None = None
    """Hidden layers (of a token-wise method: share of hidden tokens) that the paper's equation says, not rounded."""
    note: str = ""
    """Where this plan is not what the paper's rule says, and why."""

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ConfigError("kinds must name a layer at least, got none")
        if not 0.0 <= self.other_share <= 1.0:
            raise ConfigError(f"other_share must be between 0 and 1, got {self.other_share}")
        if self.other_kinds is not None and len(self.other_kinds) != len(self.kinds):
            raise ConfigError(f"other_kinds must have {len(self.kinds)} layers, got {len(self.other_kinds)}")
        if self.other_kinds is None and self.other_share:
            raise ConfigError(f"other_share must be 0 without other_kinds, got {self.other_share}")

    def kinds_of(self, span_idx: int) -> LayerKinds:
        """Of the span at this position of a history."""
        if self.other_kinds is None:
            return self.kinds
        is_other = math.floor((span_idx + 1) * self.other_share) > math.floor(span_idx * self.other_share)
        return self.other_kinds if is_other else self.kinds

    def runs(self, num_spans: int) -> KindRuns:
        """The first `num_spans` spans of a history."""
        if self.other_kinds is None:
            return ((self.kinds, num_spans),) if num_spans else ()
        return runs_of(self.kinds_of(span_idx) for span_idx in range(num_spans))

    def bytes_per_token(self, geometry: ModelGeometry) -> float:
        """Stored bytes per token of history, all layers (the paper's table 3, in bytes)."""
        main = sum(geometry.row_bytes(kind) for kind in self.kinds if kind is not None)
        other = sum(geometry.row_bytes(kind) for kind in self.other_kinds or () if kind is not None)
        return (1 - self.other_share) * main + self.other_share * other

    @property
    def hidden_layers(self) -> int:
        """Layers stored as hidden states in the main pattern."""
        return self.kinds.count(ChunkKind.HIDDEN)

    @property
    def kv_layers(self) -> int:
        """Layers stored as keys and values in the main pattern."""
        return self.kinds.count(ChunkKind.KV)

    @property
    def words(self) -> str:
        """For people: `35 of 40 layers as hidden states, 4 as K and V`."""
        parts: list[str] = []
        for kind, text in ((ChunkKind.HIDDEN, "as hidden states"), (ChunkKind.KV, "as K and V")):
            count = self.kinds.count(kind)
            if count:
                parts.append(f"{count} {text}" if parts else f"{count} of {len(self.kinds)} layers {text}")
        text = ", ".join(parts) or "nothing"
        return text if self.other_kinds is None else f"{text}, every {1 / self.other_share:.1f}th span otherwise"

    @property
    def summary(self) -> str:
        """`9RE+31H`, `36H+4KV`: the paper's table 3, layers from the first on."""
        names = {None: "RE", ChunkKind.HIDDEN: "H", ChunkKind.KV: "KV"}
        text = "+".join(f"{sum(1 for _ in layers)}{names[kind]}" for kind, layers in groupby(self.kinds))
        if self.other_kinds is None:
            return text
        other = "+".join(f"{sum(1 for _ in layers)}{names[kind]}" for kind, layers in groupby(self.other_kinds))
        return f"{text} or {self.other_share:.0%} {other}"


def uniform_storage(geometry: ModelGeometry, kind: ChunkKind) -> StoragePlan:
    """Every layer that can be, in one kind."""
    return StoragePlan(method=kind.value, kinds=SpanLayout.uniform(geometry, kind).kinds)


@dataclass(frozen=True, kw_only=True)
class RestorePlan:
    """How the first `num_tokens` tokens of a history come back.

    Tokens `[0, recompute_tokens)` go through all layers, an ordinary prefill. For the other tokens, layers
    `[0, recompute_layers)` come from a forward of these layers, and the layers from there on from the store. The last
    of the forwarded layers needs only its K and V, so 1 layer is the embedding and a projection, 2 a whole layer more.
    """

    num_tokens: int
    recompute_tokens: int
    """Equal to `num_tokens`: do not restore, prefill."""
    recompute_layers: int
    timeline: Timeline
    """Predicted."""
    closed_form: float | None = None
    """Tokens to bring back from the store that a token-wise rule says, not rounded."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "recompute_tokens"):
            value = getattr(self, name)
            if value < 0 or value % SPAN_TOKENS:
                raise ConfigError(f"{name} must be a multiple of {SPAN_TOKENS}, got {value}")
        if self.recompute_tokens > self.num_tokens:
            raise ConfigError(f"recompute_tokens must be at most {self.num_tokens}, got {self.recompute_tokens}")
        if self.recompute_layers < 0:
            raise ConfigError(f"recompute_layers must be >= 0, got {self.recompute_layers}")

    @property
    def is_prefill(self) -> bool:
        """Nothing is taken from the store."""
        return self.recompute_tokens == self.num_tokens
