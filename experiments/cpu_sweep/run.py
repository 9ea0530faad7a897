"""From IO-rich to IO-poor: how long every method takes to bring a history back, at read bandwidths of choice.

    python experiments/cpu_sweep/run.py --out experiments/cpu_sweep/results.jsonl

The real engine, saver, restorer and planner on a CPU; state lies in memory behind a `ThrottledStore`, so that the
bandwidth is emulated (`kind: emulated`) except where it says `unthrottled`. For each bandwidth the machine is profiled
through that store, every method plans from that profile, saves a history of n random tokens and restores it several
times, in turn with the others. The time is the restore's own, from admission to the last layer; for `recompute` it is
that of the prefill. `planned_s` is the plan's, from the profile alone; io, compute and bubble are the last restore's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mii_hcache.config import HCacheConfig
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.methods import METHODS
from mii_hcache.core.plans import StoragePlan
from mii_hcache.engine.ragged_engine import HCacheEngine, build_engine
from mii_hcache.engine.service import EngineService
from mii_hcache.runtime.generation import RestoreReport
from mii_hcache.runtime.profiler import MAX_CONTEXT_TOKENS, TILE_TOKENS, ProfiledTier, profile_layer
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.throttled import ThrottledStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cpu_turn2.run import ask, machine, make_model

METHOD_NAMES = ("recompute", "kv", "hidden", "naive-hybrid", "cake", "hcache", "token-wise-rounded", "auto")
STORE_BYTES = 4 << 30


def make_store(mb_per_s: float) -> ChunkStore:
    """Memory, as slow as asked."""
    memory = MemoryStore(STORE_BYTES)
    return memory if math.isinf(mb_per_s) else ThrottledStore(memory, mb_per_s * 1e6)


def profile(engine: HCacheEngine, mb_per_s: float) -> dict[str, LayerCost]:
    """What this machine costs through such a store."""
    num_tokens = min(MAX_CONTEXT_TOKENS, engine.max_context_tokens) // TILE_TOKENS * TILE_TOKENS
    store = make_store(mb_per_s)
    engine.reserve(0, num_tokens)
    try:
        tier = ProfiledTier(store=store, forget=lambda: None)
        costs, _ = profile_layer(
            adapter=engine, target=engine.target(0), num_target_tokens=num_tokens, tiers={"memory": tier}, repeats=5
        )
        return costs
    finally:
        engine.evict(0)
        store.close()


class Contender:
    """One method at one bandwidth, with its own saved state. A restore needs a token behind it, whose time does not
    count. Contenders take turns, so that a machine that gets slower is slower for all of them."""

    def __init__(self, engine: HCacheEngine, method: str, mb_per_s: float, costs: Mapping[str, LayerCost]) -> None:
        self.method = method
        self._engine = engine
        self._costs = costs
        self._store = make_store(mb_per_s)
        self._storage: StoragePlan | None = None
        self.seconds: list[float] = []
        self.planned_s: list[float | None] = []
        self._last: dict[str, float] = {}
        self._report = RestoreReport()

    def _open(self) -> EngineService:
        config = HCacheConfig(method=self.method, keep="none")
        return EngineService(
            engine=self._engine,
            store=self._store,
            method=METHODS[self.method],
            fingerprint=b"sweep",
            config=config,
            costs=self._costs,
        )

    def save(self, history: list[int]) -> None:
        """Run the history once and keep its state."""
        service = self._open()
        try:
            self._storage = service.policy.storage
            if self._storage is not None:
                ask(service, history)
                service.drain_saves()
        finally:
            service.close()

    def take_turn(self, history: list[int]) -> None:
        """Restore twice in a fresh service: the first time touches its buffers, the second one counts."""
        service = self._open()
        try:
            for _ in range(2 if self._storage is not None else 1):
                before = service.metrics()
                self._report = ask(service, [*history, 5]).report
                self.planned_s.append(self._report.planned_ms and round(self._report.planned_ms / 1e3, 4))
            after = service.metrics()
        finally:
            service.close()
        is_restored = self._report.restored_tokens > 0
        took_ms = self._report.restore_ms if is_restored else self._report.ttft_ms
        assert took_ms is not None
        self.seconds.append(took_ms / 1e3)
        self._last = {
            name: value - before.get(name, 0.0) for name, value in after.items() if name.startswith("restore")
        }

    def row(self, num_tokens: int) -> dict[str, Any]:
        """What came out; the store is given up."""
        self._store.close()
        report, storage = self._report, self._storage
        return {
            "method": self.method,
            "stored": "-" if storage is None else storage.summary,
            "bytes_per_token": 0 if storage is None else round(storage.bytes_per_token(self._engine.geometry)),
            "recompute_tokens": report.recomputed_tokens if report.restored_tokens else num_tokens,
            "ways": report.method or "prefill",
            "restore_s": round(statistics.median(self.seconds), 4),
            "restore_s_all": [round(value, 4) for value in self.seconds],
            "planned_s": self.planned_s[0],
            "read_bytes": round(self._last.get("restored_bytes_total", 0.0)),
            "io_s": round(self._last.get("restore_io_seconds_total", 0.0), 4),
            "compute_s": round(self._last.get("restore_compute_seconds_total", 0.0), 4),
            "bubble_s": round(self._last.get("restore_bubble_seconds_total", 0.0), 4),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b", help="demo, 1b, or a checkpoint's folder")
    parser.add_argument("--history", type=int, default=1024, help="tokens")
    parser.add_argument("--bandwidths", default="50,100,200,400,inf", help="MB/s; inf does not throttle")
    parser.add_argument("--methods", default=",".join(METHOD_NAMES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models-dir", type=Path, default=Path(tempfile.gettempdir()) / "mii_hcache-models")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    options = parser.parse_args()
    options.models_dir.mkdir(parents=True, exist_ok=True)
    num_tokens = options.history // SPAN_TOKENS * SPAN_TOKENS
    engine = build_engine(
        str(make_model(options.model, options.models_dir)), num_blocks=max(260, num_tokens // 16 + 20)
    )
    history = random.Random(1).choices(range(3, 2000), k=num_tokens)
    about = {**machine(), "model": options.model, "dtype": engine.geometry.dtype, "history_tokens": num_tokens}
    about["kv_bytes_per_token"] = engine.geometry.bytes_per_token(ChunkKind.KV)
    with options.out.open("w") as out:
        for mb_per_s in (float(value) for value in options.bandwidths.split(",")):
            costs = profile(engine, mb_per_s)
            is_throttled = not math.isinf(mb_per_s)
            about["kind"] = "emulated" if is_throttled else "measured"
            about["read_mb_per_s"] = mb_per_s if is_throttled else "unthrottled"
            about["profile"] = {name: float(f"{value:.4g}") for name, value in vars(replace(costs["memory"])).items()}
            contenders = [Contender(engine, method, mb_per_s, costs) for method in options.methods.split(",")]
            for contender in contenders:
                contender.save(history)
            for turn in range(options.repeats):
                for contender in contenders:
                    if turn == 0 or contender.method != "recompute":
                        contender.take_turn(history)
            rows = [contender.row(num_tokens) for contender in contenders]
            for row in rows:
                out.write(json.dumps({**about, **row}) + "\n")
                out.flush()
                planned = "" if row["planned_s"] is None else f"planned {row['planned_s']:.3f} s"
                print(
                    f"{mb_per_s:6g} MB/s  {row['method']:18s} {row['stored']:24s} {row['restore_s']:7.3f} s  "
                    f"{planned:16s} io {row['io_s']:6.3f}  compute {row['compute_s']:6.3f}  "
                    f"bubble {row['bubble_s']:6.3f}  recomputed {row['recompute_tokens']:5d}  {row['ways']}",
                    flush=True,
                )
            others = [row for row in rows if row["method"] != "auto"]
            mine = [row for row in rows if row["method"] == "auto"]
            if mine and others:
                best = min(others, key=lambda row: row["restore_s"])
                ratio = mine[0]["restore_s"] / best["restore_s"]
                print(f"        auto over the best other ({best['method']}): {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
