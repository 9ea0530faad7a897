"""Exactness on the machine at hand: random models of both kinds of attention; a checkpoint of one's own with L-Eval.

`MII_HCACHE_MODEL` names a checkpoint's folder with real weights; it is run instead of the random models, and with
L-Eval's files (`--data`) answers its questions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from experiments.common.bench import needs_gpu
from experiments.common.checkpoints import SHAPES
from experiments.common.item import Cell, Context
from experiments.common.random_weights import random_engine
from experiments.common.rows import Row
from experiments.common.workloads import LEVAL_TASKS, MissingData
from experiments.exactness.agreement import Load, measure, rows
from experiments.exactness.config import ITEM, RESIDENT
from experiments.exactness.contexts import WAYS
from experiments.exactness.leval_answers import Asked
from experiments.exactness.leval_answers import rows as leval_rows
from mii_hcache.engine.ragged_engine import HCacheEngine, build_engine
from mii_hcache.runtime.machine import device_name

_DTYPES = ("float32", "bfloat16", "float16")
_SCALES = {
    "smoke": Load(num_prompts=2, history_tokens=192, tail_tokens=24, answer_tokens=8),
    "small": Load(num_prompts=2, history_tokens=512, tail_tokens=40, answer_tokens=16),
    "paper": Load(num_prompts=8, history_tokens=2048, tail_tokens=64, answer_tokens=64),
}
_ASKED = {
    "smoke": Asked(num_documents=1, num_questions=1, context_tokens=512, answer_tokens=8),
    "small": Asked(num_documents=3, num_questions=2, context_tokens=2048, answer_tokens=48),
    "paper": Asked(num_documents=100, num_questions=20, context_tokens=14336, answer_tokens=512),
}


def cells(context: Context) -> Sequence[Cell]:
    """One for each model and dtype, or for the model of one's own and each of L-Eval's tasks."""
    load, model = _SCALES[context.scale], os.environ.get("MII_HCACHE_MODEL")
    if model:
        own = Cell(key=Path(model).name, measure=partial(_own_rows, model, load))
        return [own, *(_leval_cell(context, model, task) for task in LEVAL_TASKS.values())]
    if context.scale == "paper" and not torch.cuda.is_available():
        return needs_gpu(ITEM.key, ITEM.panels)
    shape = context.pick(smoke="demo", small="250m", paper="llama2-7b")
    return [
        Cell(key=f"{shape} {attention} {dtype}", measure=partial(_random_rows, shape, attention, dtype, load))
        for attention in ("MHA", "GQA")
        for dtype in _DTYPES
    ]


def _room(num_tokens: int) -> dict[str, int]:
    """For a context, and for another that is restored beside it."""
    return {"num_blocks": 2 * (num_tokens // 16 + 2) + 16, "max_batch_tokens": 512}


def _machine(engine: HCacheEngine, model: str) -> str:
    return f"{device_name(engine.device)}, {model}"


def _random_rows(shape: str, attention: str, dtype: str, load: Load) -> Iterator[Row]:
    num_kv_heads = SHAPES[shape]["num_attention_heads"] // (1 if attention == "MHA" else 4)
    engine = random_engine(shape, dtype=dtype, num_kv_heads=num_kv_heads, **_room(load.num_tokens))
    yield from _rows(engine, f"{shape} {attention}", load)


def _own_rows(model: str, load: Load) -> Iterator[Row]:
    yield from _rows(build_engine(model, **_room(load.num_tokens)), Path(model).name, load)


def _rows(engine: HCacheEngine, name: str, load: Load) -> Iterator[Row]:
    found = measure(engine, WAYS, load)
    yield from rows(found, x=f"{name} {engine.geometry.dtype}", machine=_machine(engine, name), load=load)


def _leval_cell(context: Context, model: str, task: str) -> Cell:
    asked = _ASKED[context.scale]

    def found() -> Iterator[Row]:
        try:
            engine = _leval_engine(model, asked)
            yield from leval_rows(engine, Path(model), task, context.data, asked, _machine(engine, Path(model).name))
        except MissingData as reason:
            row: dict[str, Any] = {"figure": ITEM.key, "series": RESIDENT, "x": task, "y": None, "how": "measured"}
            yield Row(**row, panel="e", unit="score", note=f"not yet measured: {reason}")
            yield Row(**row, panel="f", unit="ratio", note=f"not yet measured: {reason}")

    return Cell(key=f"{Path(model).name} {task}", measure=found)


@lru_cache(maxsize=1)
def _leval_engine(model: str, asked: Asked) -> HCacheEngine:
    return build_engine(model, **_room(asked.context_tokens + asked.answer_tokens + 2048))
