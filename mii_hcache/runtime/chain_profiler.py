"""What reading costs where bytes go on to a device: of restores, for a restore is what does it.

A store that is read from while the device copies and projects is one chain; its parts are told apart by the times that
the device's own events give. Written for GPUs and tested on a fake device; never run on a GPU yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.runtime.ports import EngineAdapter, KVTarget
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Stream, Streams
from mii_hcache.runtime.timeline import RestoreTimeline
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.records import SpanRecord

_LOOK_S = 0.0005


class _Blocks:
    """A `KVTarget` whose sequence stays as it is, however often it is restored."""

    def __init__(self, target: KVTarget) -> None:
        self._target = target

    def prepare(self) -> None:
        self._target.prepare()

    def fill(self, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        self._target.fill(start, token_ids, num_layers)

    def project_hidden(self, layer_idx: int, start: int, hidden: torch.Tensor) -> None:
        self._target.project_hidden(layer_idx, start, hidden)

    def write_kv(self, layer_idx: int, start: int, kv: torch.Tensor, stream: Stream) -> None:
        self._target.write_kv(layer_idx, start, kv, stream)

    def read_kv(self, layer_idx: int, start: int, out: torch.Tensor) -> None:
        self._target.read_kv(layer_idx, start, out)

    def gather_kv(self, layers: Sequence[int], start: int, out: torch.Tensor) -> None:
        self._target.gather_kv(layers, start, out)

    def commit(self, num_tokens: int) -> None:
        pass


class ChainReads:
    """Restores from one store, again and again. Engine thread only."""

    def __init__(
        self, adapter: EngineAdapter, target: KVTarget, store: ChunkStore, streams: Streams | None = None
    ) -> None:
        self._target = _Blocks(target)
        self._restorer = Restorer(adapter=adapter, store=store, counters=Counters(), streams=streams)

    def restore(self, records: Sequence[SpanRecord]) -> RestoreTimeline:
        """Bring spans into the blocks; the timeline of it, when the device is done."""
        token_ids = [0] * (len(records) * SPAN_TOKENS)
        restore = self._restorer.start(self._target, records, token_ids)
        while restore.step(1.0, wait=True) is None:
            pass
        while not restore.is_settled:
            time.sleep(_LOOK_S)
        return restore.timeline

    def close(self) -> None:
        """End the threads."""
        self._restorer.stop()


def with_chain_reads(
    base: LayerCost,
    project_alone_s: float,
    hidden: Sequence[RestoreTimeline],
    kv: Sequence[RestoreTimeline],
    *,
    max_slowdown: float,
) -> LayerCost:
    """`base` with what reads cost: of restores of spans of one kind each, whole.

    Seconds per row are those of reads and copies together, for they overlap: whichever is slower. K and V are copied to
    their places by the device's copy engine, so that placing computes nothing. Alone, a byte of hidden states takes as
    long as one of K and V. `project_alone_s`: per token. `max_slowdown`: more is taken for a moment's noise.
    """
    kv_byte_s = min(timeline.io_s / _num_bytes(timeline) for timeline in kv)
    hidden_byte_s = min(timeline.io_s / _num_bytes(timeline) for timeline in hidden)
    project_s = min(
        sum(event.stop_s - event.start_s for event in events) / sum(event.num_tokens for event in events)
        for events in ([event for event in timeline.events if event.activity == "project"] for timeline in hidden)
    )
    return replace(
        base,
        io_hidden_s=kv_byte_s * _row_bytes(hidden[0]),
        io_kv_s=kv_byte_s * _row_bytes(kv[0]),
        c_kv_s=0.0,
        io_slowdown=min(max_slowdown, max(1.0, hidden_byte_s / kv_byte_s)),
        compute_slowdown=min(max_slowdown, max(1.0, project_s / project_alone_s)),
    )


def _num_bytes(timeline: RestoreTimeline) -> int:
    return sum(event.num_bytes for event in timeline.events if event.activity == "read")


def _row_bytes(timeline: RestoreTimeline) -> float:
    return _num_bytes(timeline) / sum(event.num_tokens for event in timeline.events if event.activity == "read")
