"""Operations and bytes of each method, over those of hidden states."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.models import MODELS
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.fig01_methods.config import ITEM, METHODS, MODEL, TOKENS
from mii_hcache.core.geometry import ChunkKind, ModelGeometry


def costs(geometry: ModelGeometry, num_tokens: int) -> dict[str, tuple[float, float]]:
    """By method: floating-point operations and bytes of one token in one layer."""
    width, kv_width = geometry.num_heads * geometry.head_size, geometry.num_kv_heads * geometry.head_size
    weights = 2 * geometry.hidden_size * (width + kv_width) + geometry.ffn_weights
    attention = 4 * width * (num_tokens + 1) / 2  # causal: half of the pairs, each multiplied twice
    hidden, kv = (float(geometry.row_bytes(kind)) for kind in (ChunkKind.HIDDEN, ChunkKind.KV))
    return {
        "Recomputation": (2 * weights + attention, 0.0),
        "KV Offload": (0.0, kv),
        "HCache": (4.0 * geometry.hidden_size * kv_width, hidden),
    }


def measure(_: Context) -> Iterator[Row]:
    """The same at every scale."""
    by_method = costs(MODELS[MODEL], TOKENS)
    for series in METHODS:
        for idx, x in enumerate(("computing", "transfer")):
            yield Row(
                figure=ITEM.key,
                series=series,
                x=x,
                y=by_method[series][idx] / by_method["HCache"][idx],
                unit="ratio",
                how="simulated",
                machine="any",
                note=f"{MODEL}, {TOKENS} tokens; the layer's own arithmetic",
            )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
