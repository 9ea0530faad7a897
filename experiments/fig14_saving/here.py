"""The same on the machine at hand: three ways to decode, in turn."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

from experiments.common.bench import bench_of, needs_gpu
from experiments.common.item import Cell, Context
from experiments.common.random_weights import random_engine
from experiments.common.rows import Row
from experiments.fig14_saving.config import HISTORY_TOKENS, ITEM
from experiments.fig14_saving.decoding import NUM_STEPS, Batch, Saved, Unsaved, Variant
from mii_hcache.config import SAVE_NAMES
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.runtime.machine import device_name, filesystem_of, num_usable_cpus

SECOND_MODEL = "llama2-13b"
_PANELS = {panel.key: panel for panel in ITEM.panels}


def cells(context: Context) -> Sequence[Cell]:
    """One for each batch size; at paper scale for both models."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, (_PANELS["c"], _PANELS["d"]))
    batches: Sequence[int] = context.pick(smoke=(1, 4), small=(1, 2, 4, 8, 16, 20), paper=(1, 2, 4, 8, 12, 16, 20))
    num_turns = context.pick(smoke=3, small=3, paper=9)
    made = []
    for size in batches:
        turns = 2 if context.scale == "small" and size > 8 else num_turns  # all of it within ten minutes on two cores
        made.append(
            Cell(key=f"{bench.model} {size}", measure=partial(measure, "c", bench.engine, bench.model, size, turns))
        )
    if context.scale == "paper":
        made += [
            Cell(key=f"{SECOND_MODEL} {size}", measure=partial(_measure_second, size, num_turns))
            for size in (1, 2, 4, 8, 16, 24, 32)
        ]
    return made


@lru_cache(maxsize=1)
def _second_engine() -> HCacheEngine:
    return random_engine(SECOND_MODEL, dtype="float16", num_blocks=32 * 44)


def _measure_second(num_sequences: int, num_turns: int) -> Iterator[Row]:
    yield from measure("d", _second_engine(), SECOND_MODEL, num_sequences, num_turns)


def measure(panel: str, engine: HCacheEngine, model: str, num_sequences: int, num_turns: int) -> Iterator[Row]:
    """One turn to warm up, then `num_turns`. Medians over turns, stretch by stretch, so that the one in which a lone
    sequence completes its span counts; then their mean."""
    turns: list[dict[str, list[float]]] = []
    span_bytes = engine.geometry.span_bytes(ChunkKind.HIDDEN)
    batch = Batch(engine, num_sequences, HISTORY_TOKENS)
    with tempfile.TemporaryDirectory(prefix="hcache-fig14-") as name:
        folder = Path(name)
        saved_bytes = (num_turns + 1) * num_sequences * span_bytes
        variants: list[Variant] = [Unsaved(engine)]
        variants += [Saved(engine, folder / save, saved_bytes, save) for save in SAVE_NAMES]
        try:
            turns = [batch.take_turn(variants) for _ in range(num_turns + 1)][1:]
            notes = "; ".join(variant.note for variant in variants if variant.note)
            where = filesystem_of(folder)
        finally:
            for variant in variants:
                variant.close()
            batch.close()
    for series in turns[0]:
        ratios = [[mine / bare for mine, bare in zip(turn[series], turn["Ideal"], strict=True)] for turn in turns]
        over = [100 * (ratio - 1) for stretches in ratios for ratio in stretches]
        yield Row(
            figure=ITEM.key,
            panel=panel,
            series=series,
            x=num_sequences,
            y=_typical([turn[series] for turn in turns]),
            unit="s",
            how="measured",
            machine=f"{device_name(engine.device)}, {num_usable_cpus()} cores, {model}",
            note=f"{100 * (_typical(ratios) - 1):+.1f} % of not saving, stretch by stretch ({min(over):+.1f} to "
            f"{max(over):+.1f}); {num_turns} turns of {NUM_STEPS} steps behind {HISTORY_TOKENS} tokens; files on "
            f"{where}; {notes}",
        )


def _typical(turns: Sequence[Sequence[float]]) -> float:
    """Of numbers by turn and stretch."""
    return statistics.fmean(statistics.median(stretch) for stretch in zip(*turns, strict=True))
