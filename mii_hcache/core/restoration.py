"""The price of every way to bring one stored history back.

A way is a pair: the first `recompute_tokens` tokens (p) are recomputed in all layers, and for the others layers below
`recompute_layers` (R) are. Recomputation waits for no read, so it is the first cell of the flow shop; then come the
stored layers in order, each in tiles. (A restorer with few buffers puts recomputation between tiles instead: computing
that always finds something to do ends at the same time.)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate, groupby, pairwise
from operator import sub

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.layout import LayerKinds, first_stored
from mii_hcache.core.makespan import NOTHING, Flow, Timeline
from mii_hcache.core.plans import KindRuns
from mii_hcache.errors import ConfigError

_Tile = tuple[tuple[int, int], ...]
"""(pattern, tokens of it), for each pattern that the tile has spans of."""


def clipped(runs: KindRuns, num_spans: int) -> KindRuns:
    """The first spans. Raises ConfigError when there are fewer."""
    left, kept = num_spans, []
    for kinds, count in runs:
        if left > 0:
            kept.append((kinds, min(count, left)))
            left -= count
    if left > 0:
        raise ConfigError(f"num_tokens must be covered by stored spans, {left} of {num_spans} are missing")
    return tuple(kept)


class Restoration:
    """Prices of one history on one machine. Pure: the same pair, the same price."""

    def __init__(
        self,
        cost: LayerCost,
        runs: KindRuns,
        num_tokens: int,
        *,
        tile_tokens: int,
        chunk_tokens: int | None = None,
    ) -> None:
        """`tile_tokens`: tokens of one layer that are read and projected at once. `chunk_tokens`: tokens that the
        engine sends through its layers at once, None for as many as a tile has. Raises ConfigError."""
        if num_tokens <= 0 or num_tokens % SPAN_TOKENS:
            raise ConfigError(f"num_tokens must be a multiple of {SPAN_TOKENS} above 0, got {num_tokens}")
        if tile_tokens <= 0 or tile_tokens % SPAN_TOKENS:
            raise ConfigError(f"tile_tokens must be a multiple of {SPAN_TOKENS} above 0, got {tile_tokens}")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
        self.cost = cost
        self.num_tokens = num_tokens
        self.tile_tokens = tile_tokens
        self.chunk_tokens = chunk_tokens or tile_tokens
        runs = clipped(runs, num_tokens // SPAN_TOKENS)
        self.patterns: tuple[LayerKinds, ...] = tuple(dict.fromkeys(kinds for kinds, _ in runs))
        self.num_layers = len(self.patterns[0])
        if any(len(kinds) != self.num_layers for kinds in self.patterns):
            raise ConfigError("all spans must have kinds for the same number of layers")
        self._firsts = [first_stored(kinds) for kinds in self.patterns]
        self._run_stops = list(accumulate(SPAN_TOKENS * count for _, count in runs))
        order = {kinds: idx for idx, kinds in enumerate(self.patterns)}
        self._run_patterns = [order[kinds] for kinds, _ in runs]
        self._before = self._tokens_before()
        self._counts: dict[int, list[tuple[int, int]]] = {}

    def _tokens_before(self) -> list[tuple[int, ...]]:
        """Tokens of each pattern before each run."""
        before: list[tuple[int, ...]] = []
        tokens, start = [0] * len(self.patterns), 0
        for pattern, stop in zip(self._run_patterns, self._run_stops, strict=True):
            before.append(tuple(tokens))
            tokens[pattern] += stop - start
            start = stop
        return before

    def _tokens_up_to(self, stop: int) -> list[int]:
        """Tokens of each pattern among the first `stop` tokens."""
        run = bisect_left(self._run_stops, stop)
        tokens = list(self._before[run])
        tokens[self._run_patterns[run]] += stop - sum(tokens)
        return tokens

    def _tokens(self, start: int, stop: int) -> _Tile:
        if len(self.patterns) == 1:
            return ((0, stop - start),)
        tokens = map(sub, self._tokens_up_to(stop), self._tokens_up_to(start))
        return tuple((pattern, count) for pattern, count in enumerate(tokens) if count)

    # --- what is possible -------------------------------------------------------------------------------------------

    @property
    def least_layers(self) -> int:
        """The smallest R that needs no token recomputed; `num_layers` when some span lacks the last layer."""
        return max(self._firsts)

    @property
    def layer_options(self) -> range:
        """Every R that some part of the history allows. Long histories want few layers and more tokens (the first
        tokens attend to the least); in short ones a layer is the finer measure."""
        return range(min(self._firsts), self.num_layers)

    @property
    def main_layer_options(self) -> list[int]:
        """The R that nearly always win, for comparing many layouts: as few layers as the store allows, and layer 0 from
        the embedding even where it is stored."""
        options = {layers for first in self._firsts for layers in (first, max(first, 1))}
        return sorted(layers for layers in options if layers < self.num_layers)

    def least_tokens(self, recompute_layers: int) -> int:
        """The smallest p with this R: beyond it every span has all layers from R on."""
        runs = zip(self._run_stops, self._run_patterns, strict=True)
        return max((stop for stop, pattern in runs if self._firsts[pattern] > recompute_layers), default=0)

    # --- what it takes ----------------------------------------------------------------------------------------------

    def timeline(self, recompute_tokens: int, recompute_layers: int) -> Timeline:
        """The flow shop. Reading and computing slow each other down on average as long as they overlap."""
        cost = self.cost
        flow = self._flow(cost, recompute_tokens, recompute_layers)
        if cost.io_slowdown > 1 or cost.compute_slowdown > 1:
            io_s, compute_s = cost.overlapped(flow.io_s, flow.compute_s)
            slowed = cost.scaled(io=_ratio(io_s, flow.io_s), compute=_ratio(compute_s, flow.compute_s))
            flow = self._flow(slowed, recompute_tokens, recompute_layers)
        return flow.timeline

    def bound_s(self, recompute_tokens: int, recompute_layers: int) -> float:
        """Not more than the timeline's makespan, and nearly that: the busier resource without a bubble, its starts as
        if tiles could be cut freely. Fast, and without the steps that whole tiles make."""
        return max(self.cost.overlapped(*self._least_s(recompute_tokens, recompute_layers)))

    def compute_bound_s(self, recompute_tokens: int, recompute_layers: int) -> float:
        """Computing alone, as in `bound_s`."""
        return self._least_s(recompute_tokens, recompute_layers)[1]

    def _least_s(self, recompute_tokens: int, recompute_layers: int) -> tuple[float, float]:
        """Reading and computing, each on its own."""
        cost, left = self.cost, self.num_tokens - recompute_tokens
        starts = cost.forward_start_s / self.chunk_tokens
        io_s = 0.0
        compute_s = self.num_layers * (cost.forward_s(0, recompute_tokens) + starts * recompute_tokens)
        if left and recompute_layers:
            compute_s += (recompute_layers - 1) * cost.forward_s(recompute_tokens, left)
            compute_s += left * (cost.c_hidden_s + starts * (recompute_layers - 1) + cost.c_start_s / self.chunk_tokens)
        io_start_s, c_start_s = cost.io_start_s / self.tile_tokens, cost.c_start_s / self.tile_tokens
        kv_start_s = c_start_s if cost.c_kv_s else 0.0
        counts = self._layer_counts(recompute_layers)
        for pattern, num_tokens in self._tokens(recompute_tokens, self.num_tokens):
            num_hidden, num_kv = counts[pattern]
            io_s += num_tokens * (num_hidden * (cost.io_hidden_s + io_start_s) + num_kv * (cost.io_kv_s + io_start_s))
            compute_s += num_tokens * (num_hidden * (cost.c_hidden_s + c_start_s) + num_kv * (cost.c_kv_s + kv_start_s))
        return io_s, compute_s

    def _layer_counts(self, recompute_layers: int) -> list[tuple[int, int]]:
        """For each pattern: hidden and kv layers from R on."""
        counts = self._counts.get(recompute_layers)
        if counts is None:
            stored = [kinds[recompute_layers:] for kinds in self.patterns]
            counts = [(kinds.count(ChunkKind.HIDDEN), kinds.count(ChunkKind.KV)) for kinds in stored]
            self._counts[recompute_layers] = counts
        return counts

    def _flow(self, cost: LayerCost, recompute_tokens: int, recompute_layers: int) -> Flow:
        flow = Flow.of(0.0, self._recompute_s(cost, recompute_tokens, recompute_layers))
        tiles = self._tiles(recompute_tokens)
        by_layer = zip(*(kinds[recompute_layers:] for kinds in self.patterns), strict=True)
        for kinds, layers in groupby(by_layer):
            layer = NOTHING
            for tile, count in tiles:
                layer = layer.then(_cell(cost, tile, kinds).times(count))
            flow = flow.then(layer.times(sum(1 for _ in layers)))
        return flow

    def _recompute_s(self, cost: LayerCost, recompute_tokens: int, recompute_layers: int) -> float:
        left = self.num_tokens - recompute_tokens
        chunks = math.ceil(recompute_tokens / self.chunk_tokens)
        compute_s = self.num_layers * (cost.forward_s(0, recompute_tokens) + chunks * cost.forward_start_s)
        if left and recompute_layers:
            compute_s += (recompute_layers - 1) * cost.forward_s(recompute_tokens, left) + left * cost.c_hidden_s
            starts_s = (recompute_layers - 1) * cost.forward_start_s + cost.c_start_s
            compute_s += math.ceil(left / self.chunk_tokens) * starts_s
        return compute_s

    def _tiles(self, start: int) -> list[tuple[_Tile, int]]:
        """Tiles of one layer from token `start` on, and how many of each in a row."""
        if len(self.patterns) == 1:
            whole, rest = divmod(self.num_tokens - start, self.tile_tokens)
            return [(((0, self.tile_tokens),), whole), (((0, rest),), 1 if rest else 0)]
        cuts = [*range(start, self.num_tokens, self.tile_tokens), self.num_tokens]
        tiles = (self._tokens(*ends) for ends in pairwise(cuts))
        return [(tile, sum(1 for _ in same)) for tile, same in groupby(tiles)]


def _cell(cost: LayerCost, tile: _Tile, kinds: tuple[ChunkKind | None, ...]) -> Flow:
    """A tile of a layer that has these kinds in the patterns: a read, and a projection or placing, for each kind."""
    num_hidden = num_kv = 0
    for pattern, tokens in tile:
        if kinds[pattern] is ChunkKind.HIDDEN:
            num_hidden += tokens
        elif kinds[pattern] is ChunkKind.KV:
            num_kv += tokens
    io_s = num_hidden * cost.io_hidden_s + num_kv * cost.io_kv_s
    compute_s = num_hidden * cost.c_hidden_s + num_kv * cost.c_kv_s
    io_s += cost.io_start_s * ((num_hidden > 0) + (num_kv > 0))
    compute_s += cost.c_start_s * ((num_hidden > 0) + (num_kv > 0 and cost.c_kv_s > 0))
    return Flow.of(io_s, compute_s)


def _ratio(slowed_s: float, alone_s: float) -> float:
    return slowed_s / alone_s if alone_s else 1.0
