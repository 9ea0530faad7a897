"""What a restore has to do: tiles to read and place, and tokens to fill in by a forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.layout import SpanLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Chunks of consecutive spans, one layer, one kind: read together, placed together."""

    layer_idx: int
    first_span: int
    num_spans: int
    kind: ChunkKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Fill:
    """Tokens `[start, stop)` whose K and V in layers `[0, num_layers)` come from a forward over their ids."""

    start: int
    stop: int
    num_layers: int


def plan_fills(
    layouts: Sequence[SpanLayout], *, num_layers: int, recompute_tokens: int, recompute_layers: int
) -> list[Fill]:
    """Fills in the order in which they must run. The first `recompute_tokens` tokens go through all `num_layers`
    layers; of the others, layers that some span lacks do: at least `recompute_layers`, in all of them.

    One missing layer needs only the embedding, so spans that have it are left out.
    """
    num_tokens = len(layouts) * SPAN_TOKENS
    fills = []
    if recompute_tokens:
        fills.append(Fill(start=0, stop=recompute_tokens, num_layers=num_layers))
    if recompute_tokens == num_tokens:
        return fills
    depth = filled_layers(layouts, recompute_tokens=recompute_tokens, recompute_layers=recompute_layers)
    if depth > 1:
        fills.append(Fill(start=recompute_tokens, stop=num_tokens, num_layers=depth))
    else:
        for lacks, span_idxs in groupby(
            range(recompute_tokens // SPAN_TOKENS, len(layouts)), lambda span_idx: layouts[span_idx].kinds[0] is None
        ):
            spans = list(span_idxs)
            if lacks:
                fills.append(Fill(start=spans[0] * SPAN_TOKENS, stop=(spans[-1] + 1) * SPAN_TOKENS, num_layers=1))
    return fills


def plan_tiles(
    layouts: Sequence[SpanLayout],
    *,
    recompute_tokens: int,
    recompute_layers: int,
    tile_spans: int,
    first_spans: int | None = None,
) -> Iterator[Tile]:
    """Everything that is read, layer by layer, tiles of at most `tile_spans` spans of one kind. `first_spans`: the
    first tile has as many at most, each one behind it so many more: readers who begin at the same time end one after
    the other, and whoever waits for the first of them waits less."""
    first = recompute_tokens // SPAN_TOKENS
    if first == len(layouts):
        return
    size = step = min(tile_spans, first_spans or tile_spans)
    depth = filled_layers(layouts, recompute_tokens=recompute_tokens, recompute_layers=recompute_layers)
    for layer_idx in range(depth if depth > 1 else 0, layouts[0].num_layers):
        kinds = [layout.kinds[layer_idx] for layout in layouts]
        for kind, span_idxs in groupby(range(first, len(layouts)), kinds.__getitem__):
            spans = list(span_idxs)
            at = 0 if kind is not None else len(spans)
            while at < len(spans):
                assert kind is not None
                num_spans = min(size, len(spans) - at)
                yield Tile(layer_idx=layer_idx, first_span=spans[at], num_spans=num_spans, kind=kind)
                at += num_spans
                size = min(tile_spans, size + step)


def filled_layers(layouts: Sequence[SpanLayout], *, recompute_tokens: int, recompute_layers: int) -> int:
    """How many leading layers of the tokens behind `recompute_tokens` come from a forward."""
    behind = layouts[recompute_tokens // SPAN_TOKENS :]
    return max([recompute_layers, *(layout.first_stored for layout in set(behind))])
