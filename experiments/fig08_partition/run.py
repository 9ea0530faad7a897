"""Which cell is stored as what, and when it is read and projected."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.simulator import Interval
from experiments.common.strips import interval_points
from experiments.fig08_partition.config import COST, GEOMETRY, ITEM, NUM_SPANS, WAYS
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.layout import LayerKinds
from mii_hcache.core.methods import plan_storage


def spans_of(method: str) -> list[LayerKinds]:
    """The kinds of each span's layers, as the method stores a history of that length."""
    tokens = NUM_SPANS * SPAN_TOKENS
    storage = plan_storage(method, GEOMETRY, COST, lengths=(tokens,), tile_tokens=SPAN_TOKENS)
    return [kinds for kinds, count in storage.runs(NUM_SPANS) for _ in range(count)]


def timeline(spans: list[LayerKinds]) -> list[Interval]:
    """Reads one after the other, layer by layer; every hidden row is projected once it is there. Seconds are units."""
    done: list[Interval] = []
    read_s = compute_s = 0.0
    for layer in range(GEOMETRY.num_layers):
        for kinds in spans:
            kind = kinds[layer]
            assert kind is not None
            took_s = COST.io_hidden_s if kind is ChunkKind.HIDDEN else COST.io_kv_s
            done.append(_interval("read", layer, kind, read_s, took_s))
            read_s += took_s
            if kind is ChunkKind.HIDDEN:
                compute_s = max(compute_s, read_s)
                done.append(_interval("compute", layer, kind, compute_s, COST.c_hidden_s))
                compute_s += COST.c_hidden_s
    return done


def _interval(resource: str, layer: int, kind: ChunkKind, start_s: float, took_s: float) -> Interval:
    return Interval(resource=resource, layer_idx=layer, kind=kind.value, start_s=start_s, stop_s=start_s + took_s)


def measure(_: Context) -> Iterator[Row]:
    """The same at every scale."""
    for way, method in WAYS.items():
        spans = spans_of(method)
        words = {"figure": ITEM.key, "how": "simulated", "machine": "made up", "note": f"method {method}"}
        for idx, kinds in enumerate(spans):
            for layer, kind in enumerate(kinds):
                assert kind is not None
                yield Row(panel=f"cells, {way}", series=kind.value, x=f"{layer} {idx}", y=1.0, unit="cell", **words)
        for series, x, y in interval_points(timeline(spans)):
            yield Row(panel=f"time, {way}", series=series, x=x, y=y, unit="projections", **words)


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
