"""How far every way's logits are from those of a context that never left, on one engine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from experiments.common.rows import Row
from experiments.exactness.config import BOUND, ITEM, NOISE
from experiments.exactness.contexts import Contexts, Saved, Way
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.tools.limits import SPLITS, Limits, noise_of


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is run for one model and dtype."""

    num_prompts: int
    history_tokens: int
    """Whole spans."""
    tail_tokens: int
    """Of the prompt, behind the history: always prefilled."""
    answer_tokens: int

    @property
    def num_tokens(self) -> int:
        """Of a whole context."""
        return self.history_tokens + self.tail_tokens + self.answer_tokens


@dataclass(kw_only=True)
class Distance:
    """From the reference, over all prompts and answer tokens."""

    largest: float = 0.0
    _sum: float = 0.0
    _count: int = 0
    num_tokens: int = 0
    num_equal: int = 0
    missed_gaps: list[float] = field(default_factory=list)
    """How far the reference's best two logits were apart where another token came."""

    def add(self, logits: torch.Tensor, reference: torch.Tensor) -> None:
        """Both `[num_tokens, vocab]`, float32. What is not a number is infinitely far."""
        difference = (logits - reference).abs().nan_to_num(nan=float("inf"))
        self.largest = max(self.largest, float(difference.max()))
        self._sum += float(difference.double().sum())
        self._count += difference.numel()
        is_equal = logits.argmax(-1) == reference.argmax(-1)
        self.num_tokens += is_equal.numel()
        self.num_equal += int(is_equal.sum())
        best = reference.topk(2, dim=-1).values
        self.missed_gaps += (best[:, 0] - best[:, 1])[~is_equal].tolist()

    @property
    def mean(self) -> float:
        """Over all logits."""
        return self._sum / self._count

    @property
    def equal_share(self) -> float:
        """Of the likeliest tokens."""
        return self.num_equal / self.num_tokens

    def num_flipped(self, bound: float) -> int:
        """Tokens that differ although the reference's choice was clear: its best two logits further apart than twice
        the bound."""
        return sum(gap > 2 * bound for gap in self.missed_gaps)


@dataclass(kw_only=True)
class Agreement:
    """Of one engine."""

    limits: Limits
    by_way: dict[str, Distance]
    """`NOISE` is one of them."""
    told: tuple[str, ...]
    """What was restored how."""
    num_clear: int
    """Answer tokens whose choice was clear."""


def measure(engine: HCacheEngine, ways: Sequence[Way], load: Load, *, seed: int = 20250330) -> Agreement:
    """Every way on the same prompts of random tokens. The reference chooses its own answer; all others are given it."""
    contexts = Contexts(engine)
    by_way = {name: Distance() for name in (NOISE, *(way.name for way in ways))}
    vocab, chance = int(engine.model().vocab_size), random.Random(seed)
    gaps: list[float] = []
    largest_logit = noise = 0.0
    told: dict[str, str] = {}
    for _ in range(load.num_prompts):
        prompt = chance.choices(range(min(3, vocab - 1), vocab), k=load.history_tokens + load.tail_tokens)
        states = [Saved(engine, way, len(prompt)) for way in ways]
        try:
            uid = contexts.new()
            contexts.run_and_save(uid, prompt[: load.history_tokens], states)
            first = contexts.run(uid, prompt[load.history_tokens :])  # a new turn, as behind a restore
            answer, reference = contexts.choose(uid, first, load.answer_tokens)
            engine.evict(uid)
            best = reference.topk(2, dim=-1).values
            gaps += (best[:, 0] - best[:, 1]).tolist()
            largest_logit = max(largest_logit, float(reference.abs().max()))
            runs = [reference]
            for size in SPLITS:
                uid = contexts.new()
                runs.append(contexts.follow(uid, contexts.run(uid, prompt, batch_tokens=size), answer))
                by_way[NOISE].add(runs[-1], reference)
                engine.evict(uid)
            noise = max(noise, noise_of(runs))
            for state in states:
                uid, first = contexts.restored(state, prompt, load.history_tokens)
                by_way[state.way.name].add(contexts.follow(uid, first, answer), reference)
                told[state.way.name] = state.told
                engine.evict(uid)
        finally:
            for state in states:
                state.close()
    limits = Limits(dtype=engine.dtype, scale=largest_logit, noise=noise)
    num_clear = sum(gap > 2 * limits.logits for gap in gaps)
    return Agreement(limits=limits, by_way=by_way, told=tuple(told.values()), num_clear=num_clear)


def rows(agreement: Agreement, *, x: str, machine: str, load: Load) -> Iterator[Row]:
    """Panels a to d."""
    bound = agreement.limits.logits
    note = (
        f"{load.num_prompts} prompts of {load.history_tokens} + {load.tail_tokens} random tokens, answers of "
        f"{load.answer_tokens}; bound {bound:.3g}, largest logit {agreement.limits.scale:.3g}; choice clear for "
        f"{agreement.num_clear} tokens; {'; '.join(agreement.told)}"
    )

    def row(panel: str, series: str, y: float, unit: str) -> Row:
        return Row(
            figure=ITEM.key, panel=panel, series=series, x=x, y=y, unit=unit, how="measured", machine=machine, note=note
        )

    yield row("a", BOUND, bound, "logit")
    for name, distance in agreement.by_way.items():
        yield row("a", name, min(distance.largest, 1e30), "logit")
        yield row("b", name, min(distance.mean, 1e30), "logit")
        yield row("c", name, distance.equal_share, "ratio")
        yield row("d", name, distance.num_flipped(bound), "tokens")
