"""Whole spans that the store lacks, read back from the blocks of a sequence that still lives."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.layout import SpanLayout
from mii_hcache.runtime.block_reader import BlockReader
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.snapshot import Snapshot, SpanPut
from mii_hcache.runtime.stage import Stage
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.track import SequenceTrack


class Healer:
    """Saves as `kv` what was dropped, evicted or damaged. Engine thread only."""

    def __init__(
        self,
        *,
        adapter: EngineAdapter,
        counters: Counters,
        is_settled: Callable[[SequenceTrack, int], bool],
        submit: Callable[[Snapshot], None],
        stage: Stage | None = None,
        num_ranks: int = 1,
        name_put: Callable[[SequenceTrack, int], int] = lambda track, span_idx: 0,
    ) -> None:
        """`is_settled`: whether a span needs no saving; `submit` takes what was read; `stage`: None on a CPU.
        `num_ranks` save it together, of whom each has K and V of its own heads, and speak of a put by what `name_put`
        says."""
        self._num_ranks = num_ranks
        self._name_put = name_put
        self._geometry = adapter.geometry
        self._counters = counters
        self._is_settled = is_settled
        self._submit = submit
        self._blocks = BlockReader(
            adapter,
            counters,
            num_layers=self._geometry.num_layers,
            max_buffers=4,
            stage=stage,
            num_ranks=num_ranks,
        )

    def heal(self, track: SequenceTrack, wait_s: float) -> bool:
        """Save whole spans that the store lacks (dropped, evicted, damaged), read from the blocks as `kv`. Call before
        the blocks are freed.

        True when nothing is left to do. False when some span found no buffer within `wait_s` (of the whole call): try
        again, or count them with `give_up`.
        """
        deadline_s = time.monotonic() + wait_s
        for span_idx in range(track.num_spans):
            if self._is_settled(track, span_idx):
                continue
            is_read = self.heal_span(track, span_idx, max(0.0, deadline_s - time.monotonic()))
            if is_read is None:
                return False
            self._counters.add("healed_spans_total" if is_read else "unhealed_spans_total")
        return True

    def heal_span(self, track: SequenceTrack, span_idx: int, wait_s: float) -> bool | None:
        """Save one span. False when it could not be read; None when it found no buffer within `wait_s`."""
        buffer = self._blocks.acquire(wait_s)
        return None if buffer is None else self._read(track, span_idx, buffer)

    def give_up(self, track: SequenceTrack) -> None:
        """Count the spans of a sequence that were never healed; its next turn will prefill from the first of them."""
        missing = sum(not self._is_settled(track, span_idx) for span_idx in range(track.num_spans))
        self._counters.add("unhealed_spans_total", missing)

    def _read(self, track: SequenceTrack, span_idx: int, buffer: torch.Tensor) -> bool:
        """Save a span from its blocks; takes the buffer over. False: it could not be read."""
        layout = SpanLayout.uniform(self._geometry, ChunkKind.KV, self._num_ranks)
        ready = self._blocks.read(track.uid, span_idx, range(layout.num_layers), buffer)
        if ready is None:
            return False
        put = SpanPut(
            record=track.record(span_idx, layout),
            rows=list(buffer),
            releases=[partial(self._blocks.release, buffer)],
            put_id=self._name_put(track, span_idx),
        )
        self._submit(Snapshot(ready=ready, whole=[put]))
        return True
