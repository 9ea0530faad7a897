"""The two ratios of the sketch, as this machine has them: what a token of a layer takes to compute, and its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from experiments.common.bench import Bench, base_cost, bench_of, needs_gpu
from experiments.common.item import Cell, Context
from experiments.common.rows import Row
from experiments.fig01_methods.config import HERE, ITEM
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.runtime.pieces import pieces_on


def ratios(bench: Bench) -> Iterator[Row]:
    """Seconds of the profile; bytes of the geometry."""
    chunk_tokens = pieces_on(bench.engine.device).alone_fill_tokens
    cost, geometry = base_cost(bench).spread(chunk_tokens), bench.engine.geometry
    bytes_of = {kind: float(geometry.row_bytes(kind)) for kind in ChunkKind}
    hidden_s = cost.c_hidden_s + cost.c_start_s / chunk_tokens
    values = {
        ("Recomputation", "computing"): cost.token_s(bench.num_tokens),
        ("KV Offload", "computing"): cost.c_kv_s,
        ("HCache", "computing"): hidden_s,
        ("KV Offload", "transfer"): bytes_of[ChunkKind.KV],
        ("HCache", "transfer"): bytes_of[ChunkKind.HIDDEN],
    }
    for (series, x), y in values.items():
        yield Row(
            figure=ITEM.key,
            panel=HERE.key,
            series=series,
            x=x,
            y=y,
            unit="s" if x == "computing" else "bytes",
            how="measured",
            machine=bench.machine,
            note=f"of one token in one layer, in tiles of {chunk_tokens}; {bench.num_tokens} tokens of context",
        )


def cells(context: Context) -> Sequence[Cell]:
    """One cell."""
    bench = bench_of(context)
    return needs_gpu(ITEM.key, [HERE]) if bench is None else [Cell(key="profile", measure=partial(ratios, bench))]
