"""What stage 2 of saving costs the CPU: rows of one step gathered into open spans, natively and by torch.

    python -m experiments.saving_cpu.run --out results.jsonl

The shapes are those of a model of 32 layers, 4096 wide, in float16: a decode step of 1, 4 and 20 sequences (a row each,
8 KiB in each layer) and the part of a 512-token prefill that is gathered when it begins inside a span (63 rows; whole
spans are put from the ring without a copy). Both ways copy the same snapshots in turn, from a ring as large as a
server's into more open spans than the caches hold, each after the pause that a step leaves. Rows are JSON, one a pass,
medians last; GB are of bytes copied. CPU seconds are of the whole process, so torch's threads and ours both count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.common.machine import machine
from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.runtime.buffers import host_empty
from mii_hcache.runtime.scatter import NativeScatter, Scatter, TorchScatter, make_scatter
from mii_hcache.runtime.snapshot import RowCopy
from mii_hcache.runtime.track import OpenSpan
from mii_hcache.storage.native import why_not_built

NUM_LAYERS, WIDTH, DTYPE = 32, 4096, torch.float16
RING_ROWS = 768
SHAPES: dict[str, Sequence[int]] = {
    "decode 1": (1,),
    "decode 4": (1,) * 4,
    "decode 20": (1,) * 20,
    "prefill 512": (SPAN_TOKENS - 1, 1),
}
"""Rows that go to an open span, of each sequence (of a prefill: of each span that is not whole in it)."""
PAUSE_S = 0.005
"""Between snapshots, as between the steps of a fast GPU: threads that wait have gone to sleep."""


def snapshots(ring: torch.Tensor, spans: Sequence[OpenSpan], rows: Sequence[int], count: int) -> list[list[RowCopy]]:
    """Steps one after the other, at places of the ring and of the spans that go round."""
    made, start = [], 0
    for step in range(count):
        copies = []
        for idx, num_rows in enumerate(rows):
            if start + num_rows > ring.shape[1]:
                start = 0
            target = spans[(step * len(rows) + idx) % len(spans)]
            span_row = step % (SPAN_TOKENS - num_rows + 1)
            copies.append(RowCopy(source=ring[:, start : start + num_rows], target=target, span_row=span_row))
            start += num_rows
        made.append(copies)
    return made


def cost(scatter: Scatter, steps: Sequence[Sequence[RowCopy]]) -> dict[str, float]:
    """Of these snapshots: GB/s and CPU seconds per GB while copying, microseconds of a snapshot."""
    wall_s = cpu_s = 0.0
    for copies in steps:
        time.sleep(PAUSE_S)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        scatter.run(copies)
        wall_s += time.perf_counter() - began_s
        cpu_s += time.process_time() - began_cpu_s
    num_bytes = sum(copy.source.numel() * copy.source.itemsize for copies in steps for copy in copies)
    return {
        "gb_per_s": round(num_bytes / wall_s / 1e9, 3),
        "cpu_s_per_gb": round(cpu_s / num_bytes * 1e9, 4),
        "us_per_snapshot": round(wall_s / len(steps) * 1e6, 1),
        "num_bytes": num_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9, help="passes of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="snapshots of a pass (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the native engine (default: half the cores, 8 at most)")
    options = parser.parse_args()
    ways: dict[str, Scatter] = {"torch": TorchScatter(), "native": make_scatter(options.threads)}
    if not isinstance(ways["native"], NativeScatter):
        raise SystemExit(f"nothing to compare: {why_not_built()}")
    ring = host_empty(NUM_LAYERS, RING_ROWS, WIDTH, dtype=DTYPE).zero_()
    spans = [
        OpenSpan(span_idx=0, rows=host_empty(NUM_LAYERS, SPAN_TOKENS, WIDTH, dtype=DTYPE).zero_()) for _ in range(40)
    ]
    fixed = {**machine(), "kind": "measured", "native_threads": ways["native"].num_threads}
    rows: list[dict[str, Any]] = []
    with options.out.open("w", encoding="utf-8") as out:

        def tell(row: dict[str, Any]) -> None:
            out.write(json.dumps({**fixed, **row}) + "\n")
            out.flush()

        for shape, num_rows in SHAPES.items():
            steps = snapshots(ring, spans, num_rows, options.steps)
            for round_idx in range(-1, options.rounds):  # the first does not count
                for way, scatter in ways.items():
                    row = {"shape": shape, "way": way, "round": round_idx, **cost(scatter, steps)}
                    if round_idx >= 0:
                        rows.append(row)
                        tell(row)
        for shape in SHAPES:
            for way in ways:
                own = [row for row in rows if (row["shape"], row["way"]) == (shape, way)]
                names = ("gb_per_s", "cpu_s_per_gb", "us_per_snapshot")
                medians = {name: statistics.median(row[name] for row in own) for name in names}
                tell({"shape": shape, "way": way, "round": "median", **medians})
                print(f"{shape:12} {way:7}", "  ".join(f"{name} {value:g}" for name, value in medians.items()))


if __name__ == "__main__":
    main()
