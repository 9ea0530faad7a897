"""The long check: random histories evicted and restored over and over beside decoding, for as long as there is time.

    python -m experiments.gpu_restore.soak --cycles 1000 --deadline-s 3600 --out soak.jsonl

Each cycle takes one of a handful of saved histories (of random lengths up to the longest context), restores it in
slices by a way of its own while other sequences decode, runs a few tokens behind it, and compares their logits with
those that were recorded when the history was first computed. The other sequences must say what they said alone. Blocks
that are free hold NaN. Every so many cycles the histories are drawn anew. A line in the file for each finished batch of
cycles: started again with the same file it goes on behind the last one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.gpu_restore.gate import ways
from experiments.gpu_restore.rig import History, Rig
from experiments.gpu_restore.scales import SCALES, Model, Scale
from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.runtime.policy import RestoreChoice
from mii_hcache.tools.limits import NOISE_FACTOR, noise_of

BATCH_CYCLES = 20
"""With the same histories; a batch is what is resumed."""
NUM_HISTORIES = 3
PROBE_TOKENS = 8
NUM_DECODING = 4
DECODED_TOKENS = 12
SLICE_S = 0.005


class Wrong(Exception):
    """What came back is not what left."""


@dataclass(kw_only=True)
class _Kept:
    """A history, and what the engine said behind it when it was first computed."""

    histories: dict[str, History]
    probe: list[int]
    logits: torch.Tensor
    bound: float


class Soak:
    """One batch of cycles after the other on one rig."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self._rig = rig
        self._seed = seed
        self._ways = ways(rig.geometry.num_layers, 64 * SPAN_TOKENS)

    def batch(self, number: int) -> dict[str, float]:
        """Raises Wrong."""
        rig, chance = self._rig, random.Random(f"{self._seed}/{number}")
        longest = max(rig.model.contexts)
        kept = [self._new(chance, number, idx, longest) for idx in range(NUM_HISTORIES)]
        others = _Others(rig, number, chance, max(one.bound for one in kept))
        worst = 0.0
        for _ in range(BATCH_CYCLES):
            one, name = chance.choice(kept), chance.choice(list(self._ways))
            worst = max(worst, self._cycle(one, name, others) / (NOISE_FACTOR * one.bound))
        others.close()
        for one in kept:
            rig.forget(one.histories)
        if rig.engine.num_free_blocks != rig.engine.num_blocks:
            raise Wrong(f"{rig.engine.num_blocks - rig.engine.num_free_blocks} blocks were never given back")
        return {"worst": worst, "longest": max(one.histories["kv"].num_tokens for one in kept)}

    def _new(self, chance: random.Random, number: int, idx: int, longest: int) -> _Kept:
        rig = self._rig
        num_tokens = SPAN_TOKENS * chance.randrange(1, longest // SPAN_TOKENS + 1)
        token_ids = rig.tokens(num_tokens, f"soak/{number}/{idx}")
        probe = rig.tokens(PROBE_TOKENS, f"probe/{number}/{idx}")
        uid = rig.new_uid()
        histories, _ = rig.save(uid, token_ids, {name: way[0] for name, way in self._ways.items()})
        logits = self._probe(uid, probe)
        rig.engine.evict(uid)
        runs = [logits]
        for chunk in (64, 200):
            other = rig.new_uid()
            rig.prefill(other, token_ids, chunk=chunk)
            runs.append(self._probe(other, probe))
            rig.engine.evict(other)
        bound = noise_of(runs)
        if not math.isfinite(bound):  # it would allow anything
            raise Wrong(f"{num_tokens} tokens: the engine's own logits are not finite")
        floor = float(torch.finfo(rig.engine.dtype).eps) * float(logits.abs().max())
        return _Kept(histories=histories, probe=probe, logits=logits, bound=max(bound, floor))

    def _probe(self, uid: int, probe: Sequence[int]) -> torch.Tensor:
        """Logits of a few tokens, one by one: `[num_tokens, vocab]`, float32, host."""
        rows = [self._rig.step([uid], [[token]])[0].float().cpu() for token in probe]
        return torch.stack(rows)

    def _cycle(self, one: _Kept, name: str, others: _Others) -> float:
        """Restore while the others decode. The largest difference of the probe's logits."""
        rig = self._rig
        history = one.histories[name]
        _, recompute_tokens, recompute_layers = self._ways[name]
        choice = RestoreChoice(
            recompute_tokens=min(recompute_tokens, history.num_tokens // SPAN_TOKENS // 2 * SPAN_TOKENS),
            recompute_layers=recompute_layers,
            tiers=("memory",),
            plan=None,
        )
        uid = rig.new_uid()
        restore = rig.start(uid, history, choice)
        outcome = None
        while outcome is None:
            outcome = restore.step(SLICE_S, wait=False)
            others.step()
        if outcome.num_tokens != history.num_tokens:
            raise Wrong(f"by {name}: {outcome.num_tokens} of {history.num_tokens} tokens: {outcome.cut_reason}")
        logits = self._probe(uid, one.probe)
        rig.engine.evict(uid)
        difference = float((logits - one.logits).abs().max())
        if not difference <= NOISE_FACTOR * one.bound:
            place = f"by {name}, {history.num_tokens} tokens"
            raise Wrong(f"{place}: logits differ by {difference:g}, batch splits by {one.bound:g}")
        return difference


class _Others:
    """Sequences that decode beside restores: known tokens, again and again, which must say the same each time."""

    def __init__(self, rig: Rig, number: int, chance: random.Random, bound: float) -> None:
        self._rig, self._bound = rig, bound
        self._uids = [rig.new_uid() for _ in range(NUM_DECODING)]
        self._lengths = [chance.randrange(1, 2 * SPAN_TOKENS) for _ in self._uids]
        self._tokens = [rig.tokens(DECODED_TOKENS, f"others/{number}/{idx}") for idx in range(NUM_DECODING)]
        for idx, (uid, length) in enumerate(zip(self._uids, self._lengths, strict=True)):
            rig.prefill(uid, rig.tokens(length, f"prompt/{number}/{idx}"))
        self._at = 0
        self._said = [self._run().float().cpu() for _ in range(DECODED_TOKENS)]

    def _run(self) -> torch.Tensor:
        if self._at == DECODED_TOKENS:
            self._at = 0
            for uid, length in zip(self._uids, self._lengths, strict=True):
                self._rig.engine.truncate(uid, length)
        self._at += 1
        return self._rig.step(self._uids, [[tokens[self._at - 1]] for tokens in self._tokens])

    def step(self) -> None:
        """Raises Wrong unless the logits are those of the first time."""
        logits = self._run().float().cpu()
        difference = float((logits - self._said[self._at - 1]).abs().max())
        if not difference <= NOISE_FACTOR * self._bound:
            raise Wrong(
                f"beside a restore: the others' logits differ by {difference:g}, batch splits by {self._bound:g}"
            )

    def close(self) -> None:
        """Free their blocks."""
        for uid in self._uids:
            self._rig.engine.evict(uid)


def run(model: Model, scale: Scale, *, cycles: int, deadline_s: float, out: Path, seed: int, layers: int) -> int:
    """Cycles that were done in all, those of earlier runs in the file included. Raises Wrong."""
    lines = out.read_text().splitlines() if out.is_file() else []
    done = sum(json.loads(line)["cycles"] for line in lines)
    started_s = time.monotonic()
    rig = Rig(model, scale, num_layers=layers)
    try:
        soak = Soak(rig, seed)
        while done < cycles and time.monotonic() - started_s < deadline_s:
            found = soak.batch(done // BATCH_CYCLES)
            done += BATCH_CYCLES
            with out.open("a") as file:
                file.write(json.dumps({"cycles": BATCH_CYCLES, "model": rig.name, **found}) + "\n")
            print(
                f"{done}/{cycles} cycles, {time.monotonic() - started_s:.0f} s, worst {found['worst']:.2f} of allowed"
            )
    finally:
        rig.close()
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Status 1 when something was wrong; 0 also when the deadline came first, which it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="h200")
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--deadline-s", type=float, default=3600.0, help="no batch of cycles starts after this")
    parser.add_argument("--layers", type=int, default=4, help="of the model's: few make many cycles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write, and to go on from")
    options = parser.parse_args(argv)
    scale = SCALES[options.scale]
    try:
        done = run(
            scale.models[0],
            scale,
            cycles=options.cycles,
            deadline_s=options.deadline_s,
            out=options.out,
            seed=options.seed,
            layers=options.layers,
        )
    except Wrong as wrong:
        print(f"WRONG: {wrong}")
        return 1
    print(f"{done} of {options.cycles} cycles, all right" + ("" if done >= options.cycles else "; the time is over"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
