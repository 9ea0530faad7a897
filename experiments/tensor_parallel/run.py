"""Restore time against the number of ranks, each with a store of its own that is throttled (emulated).

    python -m experiments.tensor_parallel.run --out experiments/tensor_parallel/results.jsonl

A history is computed once and saved; then it and a few new tokens are asked for, over and over. There are as many
directories as ranks, and no rank reads its share faster than `--mb-per-s`: N ranks are as N disks. All ranks share this
machine's cores, so what they compute does not get faster as it would on GPUs of their own; with reads as slow as here
that hardly shows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from experiments.common.contenders import ask
from experiments.common.machine import machine
from mii_hcache.config import HCacheConfig
from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.engine.open import open_service

NEW_TOKENS = 16


def measure(num_ranks: int, method: str, history: list[int], rate: float, repeats: int, folder: Path) -> dict[str, Any]:
    """Median restore time and time to first token, the bytes that each rank read for one restore, and the tokens."""
    config = HCacheConfig(
        state_dir=[str(folder / f"disk{idx}") for idx in range(num_ranks)],
        method=method,
        keep="none",
        dram_capacity_bytes=1 << 20,  # the least: one rank has it, several do without
        tensor_parallel=num_ranks,
        emulated_read_bytes_per_s=rate,
        kv_blocks=400,
        dtype="float32",
    )
    opened = open_service(config)
    service = opened.service
    try:
        ask(service, history)
        service.drain_saves()
        reports, tokens = [], []
        chance = random.Random(1)
        for _ in range(repeats):
            result = ask(service, [*history, *chance.choices(range(3, 2000), k=NEW_TOKENS)])
            reports.append(result.report)
            tokens.append(result.token_ids[0])
        assert all(report.restored_tokens == len(history) // SPAN_TOKENS * SPAN_TOKENS for report in reports), reports
        counted = [service.metrics(), *(service.shared.counted() if service.shared is not None else ())]
    finally:
        opened.close()
    read = [counts.get("shard_read_bytes_total", 0.0) / repeats for counts in counted]
    if num_ranks == 1:
        read = [counted[0]["restored_bytes_total"] / repeats]
    return {
        "num_ranks": num_ranks,
        "method": method,
        "history_tokens": len(history),
        "restore_s": round(statistics.median(report.restore_ms for report in reports) / 1e3, 4),
        "restore_s_all": [round(report.restore_ms / 1e3, 4) for report in reports],
        "ttft_s": round(statistics.median(report.ttft_ms for report in reports) / 1e3, 4),
        "read_bytes_by_rank": [round(num_bytes) for num_bytes in read],
        "io_s": round(max(read) / rate, 4),
        "first_tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--methods", default="hidden,kv")
    parser.add_argument("--tokens", type=int, default=2048, help="of the history")
    parser.add_argument("--mb-per-s", type=float, default=8.0, help="of each rank's store")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    options = parser.parse_args()
    history = random.Random(options.tokens).choices(range(3, 2000), k=options.tokens)
    rate = 1e6 * options.mb_per_s
    about = {**machine(), "kind": "emulated", "model": "demo", "dtype": "float32", "read_bytes_per_s_by_rank": rate}
    with options.out.open("w") as out:
        for method in options.methods.split(","):
            alone_s, first_tokens = 0.0, None
            for num_ranks in map(int, options.ranks.split(",")):
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(num_ranks, method, history, rate, options.repeats, Path(folder))
                alone_s = alone_s or row["restore_s"]
                first_tokens = first_tokens or row["first_tokens"]
                row |= {
                    "times_as_fast": round(alone_s / row["restore_s"], 2),
                    "same_tokens": row["first_tokens"] == first_tokens,
                }
                out.write(json.dumps({**about, **row}) + "\n")
                out.flush()
                print(
                    f"{method:7s} {num_ranks} ranks  restore {row['restore_s']:7.3f} s (reads {row['io_s']:.3f})  "
                    f"{row['times_as_fast']:.2f} times  same tokens: {row['same_tokens']}"
                )


if __name__ == "__main__":
    main()
