"""The long check: random histories evicted and restored over and over beside decoding, for as long as there is time.

    python -m experiments.gpu_restore.soak --cycles 1000 --deadline-s 3600 --out soak.jsonl

Each cycle takes one of a handful of saved histories (of random lengths up to the longest context), restores it in slices
by a way of its own while other sequences decode, runs a few tokens behind it, and compares their logits with those that
were recorded when the history was first computed. Blocks that are free hold NaN; the other sequences' tokens must not
change either. Every so many cycles the histories are drawn anew. A line in the file for each finished batch of cycles:
started again with the same file it goes on behind the last one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.gpu_restore.gate import SLACK, ways
from experiments.gpu_restore.rig import History, Rig
from experiments.gpu_restore.scales import SCALES, Model, Scale
from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.runtime.policy import RestoreChoice

BATCH_CYCLES = 20
"""With the same histories; a batch is what is resumed."""
NUM_HISTORIES = 3
PROBE_TOKENS = 8
NUM_DECODING = 4
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
        decoding = [rig.new_uid() for _ in range(NUM_DECODING)]
        prompts = [rig.tokens(chance.randrange(1, 2 * SPAN_TOKENS), f"{number}/{uid}") for uid in decoding]
        alone = self._decode_alone(decoding, prompts)
        worst = 0.0
        for uid, prompt in zip(decoding, prompts, strict=True):
            rig.prefill(uid, prompt)
        step_idx = 0
        for _ in range(BATCH_CYCLES):
            one = chance.choice(kept)
            name = chance.choice(list(self._ways))
            worst = max(worst, self._cycle(one, name, decoding, alone, step_idx) / (SLACK * one.bound))
            step_idx = (step_idx + 1) % (len(alone[0]) - PROBE_TOKENS)
        for uid in decoding:
            rig.engine.evict(uid)
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
        bound = 0.0
        for chunk in (64, 200):
            other = rig.new_uid()
            rig.prefill(other, token_ids, chunk=chunk)
            bound = max(bound, float((self._probe(other, probe) - logits).abs().max()))
            rig.engine.evict(other)
        floor = float(torch.finfo(rig.engine.dtype).eps) * float(logits.abs().max())
        return _Kept(histories=histories, probe=probe, logits=logits, bound=max(bound, floor))

    def _probe(self, uid: int, probe: Sequence[int]) -> torch.Tensor:
        """Logits of a few tokens, one by one: `[num_tokens, vocab]`, float32, host."""
        rows = [self._rig.step([uid], [[token]])[0].float().cpu() for token in probe]
        return torch.stack(rows)

    def _decode_alone(self, uids: Sequence[int], prompts: Sequence[list[int]]) -> list[list[int]]:
        """What each sequence says, greedily, while nothing is restored: by sequence."""
        rig, said = self._rig, []
        for uid, prompt in zip(uids, prompts, strict=True):
            token = int(rig.prefill(uid, prompt).argmax())
            tokens = [token]
            for _ in range(BATCH_CYCLES + PROBE_TOKENS):
                tokens.append(int(rig.step([uid], [[tokens[-1]]])[0].argmax()))
            said.append(tokens)
            rig.engine.evict(uid)
        return said

    def _cycle(
        self, one: _Kept, name: str, decoding: Sequence[int], alone: Sequence[Sequence[int]], step_idx: int
    ) -> float:
        """Restore while the others decode their known tokens. The largest difference of the probe's logits."""
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
        lengths = [rig.engine.seen_tokens(other) for other in decoding]
        outcome = None
        while outcome is None:
            outcome = restore.step(SLICE_S, wait=False)
            logits = rig.step(decoding, [[tokens[step_idx]] for tokens in alone])
            if not torch.isfinite(logits).all():
                raise Wrong(f"beside a restore by {name}: the others' logits are not finite")
            for other, length in zip(decoding, lengths, strict=True):
                rig.engine.truncate(other, length)
        if outcome.num_tokens != history.num_tokens:
            raise Wrong(f"by {name}: {outcome.num_tokens} of {history.num_tokens} tokens: {outcome.cut_reason}")
        logits = self._probe(uid, one.probe)
        rig.engine.evict(uid)
        difference = float((logits - one.logits).abs().max())
        if not difference <= SLACK * one.bound:
            raise Wrong(
                f"by {name}, {history.num_tokens} tokens: logits differ by {difference:g}, batch splits by {one.bound:g}"
            )
        rig.step(decoding, [[tokens[step_idx]] for tokens in alone])  # and on
        return difference


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
            print(f"{done}/{cycles} cycles, {time.monotonic() - started_s:.0f} s, worst {found['worst']:.2f} of allowed")
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
