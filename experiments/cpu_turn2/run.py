"""Time to the first token of a second turn on a CPU: recompute, K and V, hidden states, resident.

    python -m experiments.cpu_turn2.run --model demo --out experiments/cpu_turn2/demo.jsonl
    python -m experiments.cpu_turn2.run --model 1b   --out experiments/cpu_turn2/1b.jsonl

A history of n random tokens runs once and is saved; then the history and 32 new tokens are asked for, over and over, by
each way. One process, one engine, no other load; medians. Restores from files read past the page cache (the kernel is
told to forget the files first). Everything is measured; nothing is throttled or simulated.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.bench import MODELS_DIR
from experiments.common.checkpoints import make_model
from experiments.common.contenders import ask
from experiments.common.machine import machine
from mii_hcache.config import HCacheConfig
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.methods import METHODS
from mii_hcache.engine.measuring import forget_files
from mii_hcache.engine.ragged_engine import HCacheEngine, build_engine
from mii_hcache.engine.service import EngineService
from mii_hcache.storage.open import OpenedState, open_state

NEW_TOKENS = 32
DRAM_BYTES, FILE_BYTES = 6 << 30, 12 << 30


@dataclass(frozen=True)
class Way:
    """One way to bring a history back."""

    name: str
    method: str
    keep: str
    tier: str | None


WAYS = (
    Way("recompute", "recompute", "none", None),
    Way("kv, memory", "kv", "none", "memory"),
    Way("kv, file", "kv", "none", "file"),
    Way("hidden, memory", "hidden", "none", "memory"),
    Way("hidden, file", "hidden", "none", "file"),
    Way("resident", "hidden", "lru", None),
)


def open_service(engine: HCacheEngine, way: Way, state: OpenedState) -> EngineService:
    """The engine behind one way's settings."""
    config = HCacheConfig(method=way.method, keep=way.keep)
    return EngineService(
        engine=engine, store=state.store, method=METHODS[way.method], fingerprint=way.method.encode(), config=config
    )


def measure(engine: HCacheEngine, way: Way, history: list[int], repeats: int, folder: Path) -> dict[str, Any]:
    """Median time to first token of the second turn, and the token that came out."""
    chance = random.Random(len(history))
    news = [chance.choices(range(3, 2000), k=NEW_TOKENS) for _ in range(repeats)]
    state_dir = folder / way.name.replace(", ", "-")
    state = open_state(state_dir, FILE_BYTES, DRAM_BYTES)
    service = open_service(engine, way, state)
    if way.keep == "none" and way.method != "recompute":
        ask(service, history)
        service.drain_saves()
        state.store.flush()
    times_ms, tokens, reports = [], [], []
    for new in news:
        if way.tier == "file":
            service.close()
            state.close()
            forget_files(state_dir)
            state = open_state(state_dir, FILE_BYTES, DRAM_BYTES)
            service = open_service(engine, way, state)
        if way.keep == "lru":
            ask(service, history)
        result = ask(service, [*history, *new])
        times_ms.append(result.report.ttft_ms)
        tokens.append(result.token_ids[0])
        reports.append(result.report)
    read_bytes = service.metrics().get("restored_bytes_total", 0.0) / (1 if way.tier == "file" else repeats)
    service.close()
    state.close()
    report = reports[-1]
    if way.tier is not None:
        assert report.restored_tokens == 64 * (len(history) // 64) and report.restored_from == way.tier, report
    if way.keep == "lru":
        assert report.resident_tokens == len(history), report
    return {
        "way": way.name,
        "history_tokens": len(history),
        "new_tokens": NEW_TOKENS,
        "ttft_ms": round(statistics.median(times_ms), 2),
        "ttft_ms_all": [round(value, 2) for value in times_ms],
        "reused_tokens": report.cached_tokens,
        "read_bytes": round(read_bytes),
        "first_tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, 1b, or a checkpoint's folder")
    parser.add_argument("--histories", default="512,2048,8192", help="history lengths in tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    options = parser.parse_args()
    engine = build_engine(str(make_model(options.model, options.models_dir)), num_blocks=1200)
    geometry = engine.geometry
    about = {
        **machine(),
        "model": options.model,
        "dtype": geometry.dtype,
        "bytes_per_token": {kind.value: geometry.bytes_per_token(kind) for kind in ChunkKind},
    }
    with options.out.open("w") as out:
        for num_tokens in (int(value) for value in options.histories.split(",")):
            history = random.Random(num_tokens + 1).choices(range(3, 2000), k=num_tokens)
            seen: set[tuple[int, ...]] = set()
            for way in WAYS:
                repeats = options.repeats if way.name != "recompute" else max(2, options.repeats // 2)
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(engine, way, history, repeats, Path(folder))
                seen.add(tuple(row["first_tokens"][: min(2, options.repeats)]))
                row["same_tokens"] = len(seen) == 1
                out.write(json.dumps({**about, **row}) + "\n")
                out.flush()
                print(f"{num_tokens:6d}  {way.name:15s} {row['ttft_ms']:10.1f} ms  same tokens: {row['same_tokens']}")


if __name__ == "__main__":
    main()
