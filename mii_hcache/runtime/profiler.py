"""What one layer of this model costs on this machine: the paper's offline profiling (section 4.1), in seconds.

Everything is measured the way restores do it: reads in tiles by the readers' threads, verified, from stores that were
told to forget what they have cached; projections, placing and forwards on a live sequence's blocks; and reading and
projecting at once, for how much each slows the other.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime.buffers import host_empty
from mii_hcache.runtime.chain_profiler import ChainReads, with_chain_reads
from mii_hcache.runtime.pieces import HOST, pieces_on
from mii_hcache.runtime.ports import EngineAdapter, KVTarget
from mii_hcache.runtime.profiled_tier import ProfiledSpans, ProfiledTier
from mii_hcache.runtime.stopwatch import Stopwatch
from mii_hcache.runtime.streams import Streams, streams_of

TILE_TOKENS = HOST.tile_spans * SPAN_TOKENS
"""Fewest tokens that can be measured with; a GPU's tiles are longer, if there is room."""
DEVICE_IO_BYTES = 512 << 20
"""Most that a GPU reads at a time to be measured, so that it takes longer than its clock's grain."""
MAX_CONTEXT_TOKENS = 4096
"""Longest history that a measured forward attends to."""
MAX_SLOWDOWN = 3.0
"""More than this is taken for a moment's noise."""


def profile_layer(
    *,
    adapter: EngineAdapter,
    target: KVTarget,
    num_target_tokens: int,
    tiers: Mapping[str, ProfiledTier],
    io_bytes: int = 64 << 20,
    repeats: int = 5,
    on_progress: Callable[[str], None] = lambda what: None,
    streams: Streams | None = None,
) -> tuple[dict[str, LayerCost], float]:
    """Costs by tier, and their spread (`MeasuredProfile.spread`). Engine thread; nothing else should run.

    The engine must be one that fills any number of layers. `target`: blocks of a live sequence for `num_target_tokens`
    (at least 512), which will hold rubbish. `io_bytes`: what is read from each tier, for each kind. `streams`: the
    device's, None for torch's.
    """
    on_progress("projecting and placing")
    streams = streams or streams_of(adapter.device)
    computing = _Computing(adapter, target, num_target_tokens, repeats, streams)
    base = computing.measure()
    costs = {}
    for name, tier in tiers.items():
        on_progress(f"reading from {name}")
        if streams.has_own_memory:
            io_bytes = max(io_bytes, DEVICE_IO_BYTES)
        with ProfiledSpans(adapter, tier, io_bytes, computing.tile_tokens // SPAN_TOKENS) as saved:
            costs[name] = (
                _with_chain(base, computing, saved, repeats)
                if streams.has_own_memory
                else _with_reads(base, computing, saved, repeats)
            )
    return costs, computing.watch.spread


def h2d_bytes_per_s(adapter: EngineAdapter, repeats: int = 9) -> float:
    """Copying a tile of K and V from pinned host memory to the device; 0 on a CPU, where nothing is copied."""
    if adapter.device.type == "cpu":
        return 0.0
    num_bytes = pieces_on(adapter.device).tile_spans * adapter.geometry.chunk_bytes(ChunkKind.KV)
    source = host_empty(num_bytes, dtype=torch.uint8)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=adapter.device)
    return num_bytes / Stopwatch(adapter.device, repeats).least_s(
        lambda: target.copy_(source, non_blocking=True), pauses=False
    )


class _Computing:
    """The engine's part."""

    def __init__(
        self,
        adapter: EngineAdapter,
        target: KVTarget,
        num_tokens: int,
        repeats: int,
        streams: Streams | None = None,
    ) -> None:
        if num_tokens < TILE_TOKENS:
            raise ValueError(f"{num_tokens} tokens are too few to measure with, {TILE_TOKENS} are needed")
        self.adapter = adapter
        self._num_tokens = min(num_tokens, MAX_CONTEXT_TOKENS)
        self.target = target
        self.streams = streams or streams_of(adapter.device)
        self.tile_tokens = min(pieces_on(adapter.device).tile_spans, num_tokens // SPAN_TOKENS) * SPAN_TOKENS
        self.watch = Stopwatch(adapter.device, repeats)
        geometry = adapter.geometry
        make = torch.Generator().manual_seed(0)
        rows = torch.randn(self.tile_tokens, geometry.hidden_size, generator=make)
        kv = torch.randn(self.tile_tokens, 2, geometry.num_kv_heads, geometry.head_size, generator=make)
        self._hidden = rows.to(adapter.dtype).to(adapter.device)
        self._kv = kv.to(adapter.dtype).to(adapter.device)
        self._layers = itertools.cycle(range(geometry.num_layers))

    def project(self, num_tokens: int | None = None) -> None:
        """One tile, or as many tokens, each time in another layer, as a restore does."""
        self.target.project_hidden(next(self._layers), 0, self._hidden[:num_tokens])

    def place(self) -> None:
        """One tile of K and V."""
        self.target.write_kv(next(self._layers), 0, self._kv, self.streams.main)

    def measure(self) -> LayerCost:
        """What does not depend on a store; reading costs nothing here."""
        for _ in self.adapter.geometry.saved_layers(ChunkKind.KV):
            self.place()  # so that forwards attend to numbers
        least_s = self.watch.least_s
        small_s, large_s = least_s(lambda: self.project(SPAN_TOKENS)), least_s(self.project)
        tile_tokens = self.tile_tokens
        c_hidden_s = max(0.0, large_s - small_s) / (tile_tokens - SPAN_TOKENS) or large_s / tile_tokens
        cost = LayerCost(
            io_hidden_s=0.0,
            io_kv_s=0.0,
            c_hidden_s=c_hidden_s,
            c_kv_s=least_s(self.place) / tile_tokens,
            c_token_s=0.0,
            c_start_s=max(0.0, small_s - SPAN_TOKENS * c_hidden_s),
        )
        return self._with_forward(cost)

    def _with_forward(self, cost: LayerCost) -> LayerCost:
        num_whole = self.adapter.geometry.num_layers - 1  # fewer might stay in a cache that all of them do not fit
        most = min(pieces_on(self.adapter.device).alone_fill_tokens, self.adapter.max_fill_tokens)
        chunk = min(most, self._num_tokens // 2)
        ids = torch.arange(chunk) % 7  # any tokens will do
        far = self._num_tokens - chunk

        def fill_s(start: int, num_tokens: int, num_layers: int) -> float:
            return self.watch.least_s(lambda: self.target.fill(start, ids[:num_tokens], num_layers))

        if num_whole == 0:
            return replace(cost, c_token_s=fill_s(0, chunk, 1) / chunk)

        def layer_s(start: int, num_tokens: int) -> float:
            all_s = fill_s(start, num_tokens, num_whole + 1)
            embedded_s = fill_s(start, num_tokens, 1)  # the embedding, and the projection of the last layer
            return (all_s - min(embedded_s, all_s / 2)) / num_whole  # more than half is noise

        near_s = layer_s(0, chunk)
        c_attention_s = max(0.0, layer_s(far, chunk) - near_s) / (chunk * far)

        def linear_s(total_s: float, num_tokens: int) -> float:
            return total_s - cost.c_start_s - c_attention_s * num_tokens * (num_tokens + 1) / 2

        few = min(SPAN_TOKENS, chunk // 2)
        large_s, small_s = linear_s(near_s, chunk), linear_s(layer_s(0, few), few)
        large_s = max(large_s, 0.05 * near_s)
        slope_s = (large_s - small_s) / (chunk - few)
        c_token_s = min(large_s / chunk, max(slope_s, 0.25 * large_s / chunk))
        return replace(
            cost,
            c_attention_s=c_attention_s,
            c_token_s=c_token_s,
            c_forward_start_s=max(0.0, large_s - chunk * c_token_s),
        )


def _with_reads(base: LayerCost, computing: _Computing, saved: ProfiledSpans, repeats: int) -> LayerCost:
    """Seconds per row of each kind, alone and while the engine projects."""
    alone_s = {}
    for kind in ChunkKind:
        times_s = []
        for _ in range(repeats):
            started_s = time.perf_counter()
            num_rows = saved.read(kind)
            times_s.append((time.perf_counter() - started_s) / max(1, num_rows))
        alone_s[kind] = min(times_s)
    project_alone_s = computing.watch.least_s(computing.project, pauses=False)
    read_s, project_s = _together(computing, saved, least_s=max(0.05, 4 * project_alone_s))
    io_slowdown = read_s / alone_s[ChunkKind.HIDDEN] if read_s else 1.0
    return replace(
        base,
        io_hidden_s=alone_s[ChunkKind.HIDDEN],
        io_kv_s=alone_s[ChunkKind.KV],
        io_slowdown=min(MAX_SLOWDOWN, max(1.0, io_slowdown)),
        compute_slowdown=min(MAX_SLOWDOWN, max(1.0, project_s / project_alone_s)),
    )


def _with_chain(base: LayerCost, computing: _Computing, saved: ProfiledSpans, repeats: int) -> LayerCost:
    """The same by whole restores, to a device."""
    project_alone_s = computing.watch.least_s(computing.project, pauses=False) / computing.tile_tokens
    reads = ChainReads(computing.adapter, computing.target, saved.store, computing.streams)
    try:
        timelines = {kind: [reads.restore(saved.records(kind)) for _ in range(1 + repeats)][1:] for kind in ChunkKind}
    finally:
        reads.close()
    return with_chain_reads(
        base, project_alone_s, timelines[ChunkKind.HIDDEN], timelines[ChunkKind.KV], max_slowdown=MAX_SLOWDOWN
    )


def _together(computing: _Computing, saved: ProfiledSpans, least_s: float) -> tuple[float, float]:
    """Read and project at once until both were done often enough. Seconds per hidden row read, and per projection."""
    is_over = threading.Event()
    rows_read = 0
    reading_s = 0.0

    def read_on() -> None:
        nonlocal rows_read, reading_s
        started_s = time.perf_counter()
        while not is_over.is_set():
            rows_read += saved.read(ChunkKind.HIDDEN, lambda: not is_over.is_set())
            reading_s = time.perf_counter() - started_s

    reader = threading.Thread(target=read_on, name="hcache-profile-reads")
    started_s = time.perf_counter()
    reader.start()
    num_projections = 0
    try:
        while True:
            computing.project()
            computing.watch.settle()
            num_projections += 1
            elapsed_s = time.perf_counter() - started_s
            if elapsed_s >= least_s and (rows_read >= saved.num_rows(ChunkKind.HIDDEN) or elapsed_s >= 8 * least_s):
                break
    finally:  # also when the engine fails: nobody goes on reading what is about to be deleted
        is_over.set()
        reader.join()
    return (reading_s / rows_read if rows_read else 0.0), elapsed_s / num_projections
