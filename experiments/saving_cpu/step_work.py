"""What saving costs the engine's thread in a step of decoding: the host work of `begin_step`, of `rows_for` and `tap`
for each layer, and of `end_step`. `in place` is a norm that writes where it is told, `copied` one that does not.

    python -m experiments.saving_cpu.step_work --out step_work.jsonl

On a GPU this is what saving takes from a step: rows are few bytes, launches and Python are what is felt. Rows are made
narrow here, so that copying them is nearly free and what is left is the work around it; nothing is computed and the
store takes spans without looking at them. CPU time of one thread, so that other programs are not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.common.machine import machine
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.identity import SpanId, chain_seed
from mii_hcache.core.plans import uniform_storage
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import HostStream, HostStreams, Stream, Streams
from mii_hcache.storage.base import ChunkStore, StoreStats
from mii_hcache.storage.records import ChunkRead, ReadOutcome, SpanRecord

GEOMETRY = ModelGeometry(num_layers=32, hidden_size=64, num_heads=4, num_kv_heads=2, head_size=16, dtype="float16")
BATCHES = (1, 8, 32)
HISTORY_TOKENS = 10 * SPAN_TOKENS


class NoStore(ChunkStore):
    """Takes every span and keeps nothing."""

    name = "none"

    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        return True

    def find(self, span_id: SpanId) -> SpanRecord | None:
        return None

    def why_missing(self, span_id: SpanId) -> str:
        return "not_saved"

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        return ReadOutcome(num_ok=0, reason="missing")

    def touch(self, span_ids: Iterable[SpanId]) -> None:
        pass

    def pin(self, span_ids: Iterable[SpanId]) -> None:
        pass

    def unpin(self, span_ids: Iterable[SpanId]) -> None:
        pass

    def delete(self, span_ids: Iterable[SpanId]) -> int:
        return 0

    def flush(self) -> None:
        pass

    def stats(self) -> StoreStats:
        raise NotImplementedError

    def close(self) -> None:
        pass


class NoEngine:
    """An adapter of a model that computes nothing."""

    device = torch.device("cpu")
    dtype = torch.float16
    geometry = GEOMETRY
    max_fill_tokens = 0

    def target(self, uid: int) -> Any:
        raise NotImplementedError


class LikeDevice(Streams):
    """Streams that do everything at once, but are not the host's: rows take the way that they take on a GPU."""

    has_own_memory = True

    def __init__(self) -> None:
        self.main = HostStream()

    def new(self, *, is_urgent: bool = False) -> Stream:
        return HostStream()


def step_work(batch: int, num_steps: int, *, is_in_place: bool, **settings: Any) -> dict[str, float]:
    """Microseconds of CPU time of the engine's thread in each part of a step, medians; `num_spans` were saved."""
    counters = Counters()
    saver = Saver(
        adapter=NoEngine(),
        store=NoStore(),
        plan=uniform_storage(GEOMETRY, ChunkKind.HIDDEN),
        max_batch_tokens=768,
        counters=counters,
        **settings,
    )
    for uid in range(batch):  # at different places within their spans, as on a server
        history = [uid] * (HISTORY_TOKENS + uid * SPAN_TOKENS // batch)
        saver.open(uid, seed=chain_seed(b"bench"), token_ids=history)
    hidden = torch.zeros(batch, GEOMETRY.hidden_size, dtype=torch.float16)
    parts: dict[str, list[float]] = {"begin": [], "taps": [], "end": []}
    clock = time.thread_time
    for step in range(num_steps):
        segments = [StepSegment(uid=uid, token_ids=[step]) for uid in range(batch)]
        times = [clock()]
        saver.begin_step(segments)
        times.append(clock())
        for layer_idx in range(GEOMETRY.num_layers):
            rows = saver.rows_for(layer_idx, batch) if is_in_place else hidden
            saver.tap(layer_idx, hidden if rows is None else rows)  # the first layer is not saved
        times.append(clock())
        saver.end_step()
        times.append(clock())
        for name, start_s, stop_s in zip(parts, times, times[1:], strict=False):
            parts[name].append(1e6 * (stop_s - start_s))
        saver.drain()
    saver.stop()
    assert counters.get("dropped_rows_total") == 0, "the bench saves nothing"
    found = {f"{name}_us": round(statistics.median(values), 1) for name, values in parts.items()}
    return {**found, "step_us": round(sum(found.values()), 1), "num_spans": counters.get("saved_spans_total")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5, help="passes of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="steps of a pass (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    streams_of: dict[str, Streams] = {"host": HostStreams(), "as on a device": LikeDevice()}
    ways = [
        (f"{name}, {norm}", streams, norm == "in place")
        for name, streams in streams_of.items()
        for norm in ("copied", "in place")
    ]
    fixed = {**machine(), "kind": "measured"}
    with options.out.open("w", encoding="utf-8") as out:
        for batch in BATCHES:
            for way, streams, is_in_place in ways:
                rounds = range(options.rounds + 1)
                rows = [step_work(batch, options.steps, is_in_place=is_in_place, streams=streams) for _ in rounds][1:]
                medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
                for round_idx, row in [*enumerate(rows), ("median", medians)]:
                    out.write(json.dumps({**fixed, "batch": batch, "way": way, "round": round_idx, **row}) + "\n")
                told = "  ".join(f"{name} {value:g}" for name, value in medians.items())
                print(f"batch {batch:2}  {way:24}  {told}")


if __name__ == "__main__":
    main()
