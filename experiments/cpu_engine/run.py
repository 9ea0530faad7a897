"""Engine speed on a CPU beside transformers: prefill and decode of the same checkpoint, by dtype, batch and length.

    python -m experiments.cpu_engine.run --out experiments/cpu_engine/results.jsonl

Both engines live in one process and take turns, length by length; nothing else may run. Prompts are random tokens of
equal length. Ours prefills in ragged batches of at most 768 tokens, as the server does; transformers runs the whole
prompts at once. A decode step is one token for every sequence. Everything is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.common.bench import MODELS_DIR
from experiments.common.checkpoints import make_model
from experiments.common.machine import machine
from mii_hcache.engine.ragged_engine import HCacheEngine, build_engine, token_tensors

STEP_TOKENS = 768
SHORT_TOKENS = 512
"""Batches of up to so many tokens run four times, the first to warm up; longer ones once."""


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call took, and what it returned."""
    started_s = time.perf_counter()
    result = action()
    return time.perf_counter() - started_s, result


@torch.inference_mode()
def run_transformers(model: Any, prompts: torch.Tensor, num_steps: int) -> tuple[float, list[float]]:
    """Prefill seconds, and seconds of each decode step."""
    prefill_s, output = timed(lambda: model(prompts, use_cache=True, logits_to_keep=1))
    past, steps_s = output.past_key_values, []
    for _ in range(num_steps):
        tokens = output.logits[:, -1].argmax(-1)[:, None]
        step_s, output = timed(
            lambda tokens=tokens: model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        )
        steps_s.append(step_s)
    return prefill_s, steps_s


def run_engine(engine: HCacheEngine, prompts: torch.Tensor, num_steps: int) -> tuple[float, list[float]]:
    """Prefill seconds, and seconds of each decode step."""
    uids = list(range(len(prompts)))

    def prefill() -> list[int]:
        """Ragged batches filled up across sequences, in order, as MII's SplitFuse does."""
        done, last = [0] * len(prompts), [0] * len(prompts)
        while min(done) < prompts.shape[1]:
            batch, room = {}, STEP_TOKENS
            for uid in uids:
                piece = prompts[uid, done[uid] : done[uid] + room].tolist()
                if piece and room:
                    batch[uid] = piece
                    room -= len(piece)
            logits = engine.put(list(batch), token_tensors(list(batch.values())))
            for uid, token in zip(batch, logits.argmax(-1).tolist(), strict=True):
                done[uid] += len(batch[uid])
                last[uid] = token
        return last

    prefill_s, tokens = timed(prefill)
    steps_s = []
    for _ in range(num_steps):
        step_s, logits = timed(lambda tokens=tokens: engine.put(uids, token_tensors([[token] for token in tokens])))
        tokens = logits.argmax(-1).tolist()
        steps_s.append(step_s)
    for uid in uids:
        engine.evict(uid)
    return prefill_s, steps_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b", help="demo, 1b, or a checkpoint's folder")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--lengths", default="128,512,2048", help="prompt lengths in tokens")
    parser.add_argument("--batches", default="1,4", help="sequences at a time")
    parser.add_argument("--steps", type=int, default=9, help="decode steps; their median counts")
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    options = parser.parse_args()
    path = str(make_model(options.model, options.models_dir))
    from transformers import AutoModelForCausalLM

    with options.out.open("w") as out:
        for dtype in options.dtypes.split(","):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
            engine = build_engine(path, dtype=dtype, num_blocks=600, max_batch_tokens=STEP_TOKENS)
            for batch in (int(value) for value in options.batches.split(",")):
                for length in (int(value) for value in options.lengths.split(",")):
                    prompts = torch.randint(3, 2000, (batch, length), generator=torch.Generator().manual_seed(length))
                    row: dict[str, Any] = {**machine(), "model": options.model, "dtype": dtype, "batch": batch}
                    row["prompt_tokens"] = length
                    repeats = 4 if batch * length <= SHORT_TOKENS else 1
                    runs: dict[str, list[tuple[float, list[float]]]] = {"transformers": [], "mii_hcache": []}
                    for _ in range(repeats):
                        runs["transformers"].append(run_transformers(model, prompts, options.steps))
                        runs["mii_hcache"].append(run_engine(engine, prompts, options.steps))
                    for name, found in runs.items():
                        counted = found[1:] or found  # the first of several warms up
                        row[f"{name}_prefill_s"] = round(statistics.median(run[0] for run in counted), 3)
                        steps_s = [step_s for run in counted for step_s in run[1]]
                        row[f"{name}_decode_ms"] = round(1e3 * statistics.median(steps_s), 1)
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                    print(
                        f"{dtype:9s} {batch} x {length:5d}: prefill {row['transformers_prefill_s']:7.2f} s against "
                        f"{row['mii_hcache_prefill_s']:7.2f} s of ours, decode {row['transformers_decode_ms']:6.1f} ms "
                        f"against {row['mii_hcache_decode_ms']:6.1f} ms",
                        flush=True,
                    )
            del model, engine


if __name__ == "__main__":
    main()
