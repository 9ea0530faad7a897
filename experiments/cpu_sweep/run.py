"""From IO-rich to IO-poor: how long every method takes to bring a history back, at read bandwidths of choice.

    python -m experiments.cpu_sweep.run --out experiments/cpu_sweep/results.jsonl

The real engine, saver, restorer and planner on a CPU; state lies in memory behind a `ThrottledStore`, so that the
bandwidth is emulated (`kind: emulated`) except where it says `unthrottled`. For each bandwidth the machine is profiled
through that store, every method plans from that profile, saves a history of n random tokens and restores it several
times, in turn with the others. The time is the restore's own, from admission to the last layer; for `recompute` it is
that of the prefill. `profiled_s` is the plan's from the profile alone, before the first restore; `planned_s` that of
the last restore, when the planner had learned from those before it, as a server's does. io, compute and bubble are the
last restore's.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.common.bench import MODELS_DIR
from experiments.common.checkpoints import make_model
from experiments.common.contenders import Outcome, profile, race
from experiments.common.machine import machine
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.engine.ragged_engine import build_engine

METHOD_NAMES = ("recompute", "kv", "hidden", "naive-hybrid", "cake", "hcache", "token-wise-rounded", "auto")


def rounded(value: Any) -> Any:
    """Floats to four digits behind the point, all the way down."""
    if isinstance(value, (tuple, list)):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def line(mb_per_s: float, outcome: Outcome) -> str:
    """For people."""
    planned = "" if outcome.planned_s is None else f"planned {outcome.planned_s:.3f} s ({outcome.profiled_s:.3f})"
    return (
        f"{mb_per_s:6g} MB/s  {outcome.method:18s} {outcome.stored:24s} {outcome.restore_s:7.3f} s  {planned:24s} "
        f"io {outcome.io_s:6.3f}  compute {outcome.compute_s:6.3f}  bubble {outcome.bubble_s / outcome.restore_s:4.0%} "
        f" recomputed {outcome.recomputed_tokens:5d}  {outcome.ways}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b", help="demo, 250m, 1b, or a checkpoint's folder")
    parser.add_argument("--history", type=int, default=1024, help="tokens")
    parser.add_argument("--bandwidths", default="50,100,200,500,inf", help="MB/s; inf does not throttle")
    parser.add_argument("--methods", default=",".join(METHOD_NAMES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    options = parser.parse_args()
    num_tokens = options.history // SPAN_TOKENS * SPAN_TOKENS
    engine = build_engine(
        str(make_model(options.model, options.models_dir)), num_blocks=max(260, num_tokens // 16 + 20)
    )
    about = {**machine(), "model": options.model, "dtype": engine.geometry.dtype, "history_tokens": num_tokens}
    about["kv_bytes_per_token"] = engine.geometry.bytes_per_token(ChunkKind.KV)
    with options.out.open("w") as out:
        for mb_per_s in (float(value) for value in options.bandwidths.split(",")):
            costs = profile(engine, mb_per_s * 1e6)
            is_throttled = not math.isinf(mb_per_s)
            about["kind"] = "emulated" if is_throttled else "measured"
            about["read_mb_per_s"] = mb_per_s if is_throttled else "unthrottled"
            about["profile"] = {name: float(f"{value:.4g}") for name, value in vars(costs["memory"]).items()}
            outcomes = race(
                engine,
                options.methods.split(","),
                mb_per_s * 1e6,
                num_tokens,
                repeats=options.repeats,
                recompute_repeats=2,
                costs=costs,
            )
            for outcome in outcomes:
                out.write(json.dumps({**about, **{k: rounded(v) for k, v in asdict(outcome).items()}}) + "\n")
                out.flush()
                print(line(mb_per_s, outcome), flush=True)
            others = [outcome for outcome in outcomes if outcome.method != "auto"]
            mine = [outcome for outcome in outcomes if outcome.method == "auto"]
            if mine and others:
                best = min(others, key=lambda outcome: outcome.restore_s)
                ratio = mine[0].restore_s / best.restore_s
                print(f"        auto over the best other ({best.method}): {ratio:.3f}", flush=True)
            errors = [abs(one.restore_s / one.planned_s - 1) for one in outcomes if one.planned_s]
            print(f"        restores differ from their plans by at most {max(errors, default=0.0):.0%}", flush=True)


if __name__ == "__main__":
    main()
