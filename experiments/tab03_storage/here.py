"""Bytes that a real store holds for a token, after a real engine saved a history."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial

from experiments.common.bench import Bench, bench_of, needs_gpu, throttled_cost
from experiments.common.contenders import ask
from experiments.common.item import Cell, Context
from experiments.common.models import METHOD_OF, MODELS, main_deployment
from experiments.common.rows import Row
from experiments.tab03_storage.config import HERE, ITEM, METHODS
from mii_hcache.config import HCacheConfig
from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.methods import METHODS as ALL_METHODS
from mii_hcache.engine.service import EngineService
from mii_hcache.storage.memory import MemoryStore


def saved(bench: Bench, model: str, num_tokens: int) -> Iterator[Row]:
    """The schedule is made for reads of the balance of the platform that the paper runs this model on."""
    deployment = main_deployment(model)
    rate = bench.read_bytes_per_s(deployment)
    cost = throttled_cost(bench, rate)
    for series in METHODS:
        method = ALL_METHODS[METHOD_OF[series]]
        store = MemoryStore(4 << 30)
        config = HCacheConfig(method=method.name, keep="none")
        service = EngineService(
            engine=bench.engine,
            store=store,
            method=method,
            fingerprint=b"bytes",
            config=config,
            costs={"memory": cost},
        )
        try:
            storage = service.policy.storage
            ask(service, random.Random(3).choices(range(3, 2000), k=num_tokens))
            service.drain_saves()
            stats = store.stats()
            per_token = stats.num_bytes / (stats.num_spans * SPAN_TOKENS)
        finally:
            service.close()
            store.close()
        yield Row(
            figure=ITEM.key,
            panel=HERE.key,
            series=series,
            x=model,
            y=per_token,
            unit="bytes",
            how="measured",
            machine=bench.machine,
            note=f"{stats.num_spans} spans in the store, as {storage.summary if storage else '-'}, for reads of "
            f"{rate / 1e6:.0f} MB/s: the balance of {deployment.platform}",
        )


def cells(context: Context) -> Sequence[Cell]:
    """A cell is one of the paper's models."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, [HERE])
    num_tokens = context.pick(smoke=256, small=1024, paper=1024)
    models = list(MODELS)[: context.pick(smoke=1, small=3, paper=3)]
    return [Cell(key=model, measure=partial(saved, bench, model, num_tokens)) for model in models]
