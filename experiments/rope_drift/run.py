"""Phases, rotated keys, scores, and the logits of a tiny model."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.rope_drift import tiny
from experiments.rope_drift.config import (
    BY_DIMENSION,
    DTYPES,
    FAST_MATH,
    FLOAT32,
    ITEM,
    KERNEL,
    MODELS,
    POSITIONS,
    ROUNDING,
    Rotary,
)
from experiments.rope_drift.kernel import (
    Floats,
    angles,
    fast_sine_angles,
    given_frequencies,
    kept_score,
    kernel_angles,
    other_head_angles,
    rotated,
    rounded,
    true_frequencies,
)

NUM_KEYS = 256
"""Random keys and queries for each number."""
NOTE = "arithmetic of the kernel as its source reads, on a CPU; never run on a GPU"


def row(panel: str, series: str, x: float, y: float, unit: str, note: str = NOTE) -> Row:
    """One number of this page."""
    return Row(
        figure=ITEM.key,
        panel=panel,
        series=series,
        x=x,
        y=y,
        unit=unit,
        how="simulated",
        machine="arithmetic on a CPU",
        note=note,
    )


def phases(rotary: Rotary, position: int) -> dict[str, Floats]:
    """Errors of K's angles at a position, in rad by dimension, by where the frequencies come from."""
    true = position * true_frequencies(rotary.theta, rotary.head_size)
    given = angles(given_frequencies(rotary.theta, rotary.head_size), position)
    found = {KERNEL[dtype]: kernel_angles(rotary.theta, rotary.head_size, dtype, position) for dtype in DTYPES}
    found |= {FLOAT32: given, FAST_MATH: fast_sine_angles(given)}
    return {series: angle - true for series, angle in found.items()}


def key_errors(rotary: Rotary, position: int) -> dict[str, float]:
    """Error of rotated K over its length (root of mean squares over random keys), stored in 16 bits."""
    keys = np.random.default_rng(position).standard_normal((NUM_KEYS, rotary.head_size))
    true = rotated(keys, position * true_frequencies(rotary.theta, rotary.head_size))
    found = {}
    for dtype in DTYPES:
        kept = rounded(keys, dtype)
        turned = rotated(kept, kernel_angles(rotary.theta, rotary.head_size, dtype, position))
        found[KERNEL[dtype]] = rounded(turned, dtype)
        given = rotated(kept, angles(given_frequencies(rotary.theta, rotary.head_size), position))
        found[ROUNDING[dtype]] = rounded(given, dtype)
    return {series: float(np.sqrt(((k - true) ** 2).sum() / (true**2).sum())) for series, k in found.items()}


def score_errors(rotary: Rotary, num_tokens: int, dtype: str) -> dict[str, float]:
    """Of the last query of a context with keys all over it (random and independent; rotary alone, no rounding of Q and
    K): error over the size of scores, for heads that share K's truncation and for those that do not."""
    chance = np.random.default_rng(num_tokens)
    at = np.linspace(0, num_tokens - 1, NUM_KEYS).round()
    queries, keys = (chance.standard_normal((NUM_KEYS, rotary.head_size)) for _ in range(2))
    here = np.full(NUM_KEYS, num_tokens - 1.0)
    frequencies = true_frequencies(rotary.theta, rotary.head_size)

    def scores(query_angle: Floats, key_angle: Floats) -> Floats:
        return np.einsum("nd,md->nm", rotated(queries, query_angle), rotated(keys, key_angle))

    true = scores(np.multiply.outer(here, frequencies), np.multiply.outer(at, frequencies))
    key_angle = kernel_angles(rotary.theta, rotary.head_size, dtype, at)
    query_angles = {
        "heads that share it": kernel_angles(rotary.theta, rotary.head_size, dtype, here),
        "other heads": other_head_angles(rotary.theta, rotary.head_size, here),
    }
    return {
        name: float(np.sqrt(((scores(angle, key_angle) - true) ** 2).mean() / (true**2).mean()))
        for name, angle in query_angles.items()
    }


def kept(rotary: Rotary, position: int, dtype: str) -> dict[str, float]:
    """Of a match's score: between neighbours at a position, and over a distance."""
    frequencies = true_frequencies(rotary.theta, rotary.head_size)

    def made(at: int) -> Floats:
        return kernel_angles(rotary.theta, rotary.head_size, dtype, at)

    other = other_head_angles(rotary.theta, rotary.head_size, position)
    return {
        "heads that share it, over such a distance": kept_score(made(position) - made(0), position * frequencies),
        "heads that share it, neighbours": kept_score(made(position) - made(position - 1), frequencies),
        "other heads, neighbours": kept_score(other - made(position - 1), frequencies),
    }


def arithmetic(context: Context) -> Iterator[Row]:
    """Panels a to f."""
    positions = context.pick(smoke=POSITIONS[::3], small=POSITIONS, paper=POSITIONS)
    for rotary, panel in zip(MODELS, "ab", strict=True):
        for position in positions:
            for series, error in phases(rotary, position).items():
                yield row(panel, series, position, float(np.abs(error).max()), "rad")
        for position in BY_DIMENSION:
            for series, error in phases(rotary, position).items():
                for dimension, value in enumerate(np.abs(error)):
                    yield row("c", f"{rotary.name} at {position:,}, {series}", dimension, float(value), "rad")
        for position in positions:
            for series, value in key_errors(rotary, position).items():
                yield row("d", f"{rotary.name}, {series}", position, value, "of its length")
        for dtype in DTYPES:
            for position in positions:
                for heads, value in score_errors(rotary, position, dtype).items():
                    if rotary.query_group > 1 or heads == "heads that share it":
                        yield row("e", f"{rotary.name}, {dtype}, {heads}", position, value, "of their size")
                for heads, value in kept(rotary, position, dtype).items():
                    if rotary.query_group > 1 or heads.startswith("heads that share it"):
                        yield row("f", f"{rotary.name}, {dtype}, {heads}", position, value, "of the true score")


def model_rows(context: Context) -> Iterator[Row]:
    """Panel g, how many next tokens are the same, and how far greedy answers are."""
    lengths = context.pick(smoke=(300,), small=(1024, 2048), paper=(1024, 2048, 4096))
    num_new = context.pick(smoke=2, small=16, paper=16)
    for rotary in MODELS:
        model = tiny.tiny_model(rotary)
        for num_tokens in lengths:
            token_ids = torch.randint(3, tiny.VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
            exact = tiny.last_logits(model, rotary, token_ids, None)
            for dtype in DTYPES:
                rounding = tiny.last_logits(model, rotary, token_ids, None, keys_kept_in=dtype)
                yield from _compared(f"{rotary.name}, {ROUNDING[dtype]}", num_tokens, rounding, exact)
                made = tiny.last_logits(model, rotary, token_ids, dtype)
                yield from _compared(f"{rotary.name}, {KERNEL[dtype]}", num_tokens, made, exact)
            if num_tokens == lengths[0]:
                answered = tiny.greedy(model, rotary, token_ids, num_new)
                for dtype in DTYPES:
                    count = tiny.agreement(model, rotary, answered, num_new, dtype)
                    note = f"{_TINY_NOTE}; of {num_new} greedy tokens, those before the first that differs"
                    yield row("greedy", f"{rotary.name}, {KERNEL[dtype]}", num_tokens, float(count), "tokens", note)


_TINY_NOTE = f"{NOTE}; a tiny model with random weights, all but the turning in float32"


def _compared(series: str, num_tokens: int, found: torch.Tensor, exact: torch.Tensor) -> Iterator[Row]:
    error = float(((found - exact).pow(2).sum() / exact.pow(2).sum()).sqrt())
    same = float((found.argmax(-1) == exact.argmax(-1)).float().mean())
    note = f"{_TINY_NOTE}; the last {tiny.LAST} positions"
    yield row("g", series, num_tokens, error, "of their size", note)
    yield row("next tokens", series, num_tokens, same, "share that is the same", note)


def measure(context: Context) -> Iterator[Row]:
    """All of it."""
    yield from arithmetic(context)
    yield from model_rows(context)


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.folder]))
