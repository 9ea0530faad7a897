"""The least time that a plan could take on this machine: its bytes and FLOPs over the peaks that were measured here.

A bound is of the plan, not of the history: a better plan has a lower one. It is the larger of two times, for copying
and computing can run side by side, and nothing in it hides anything: no latency, no launch, no first or last tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.gpu_restore.targets import Numbers
from mii_hcache.core.geometry import ModelGeometry


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a restore does."""

    read_bytes: int
    """From the host to the device."""
    product_flop: float
    """Of matrix products: projections, and layers that are computed again."""
    attention_flop: float
    """Of those layers, causal."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Peaks of this machine, as measured by the calibration."""

    copy_bytes_per_s: float
    product_flop_per_s: float
    attention_flop_per_s: float

    @classmethod
    def of(cls, numbers: Numbers, model: str, read_bytes_per_s: float | None = None) -> Ceilings | None:
        """The best of every size for each; None when some of it was not measured. `read_bytes_per_s`: of an emulated
        device, where it is slower than the link."""
        found = [
            max((numbers.get(panel, name, x) or 0.0 for name, x in numbers.places(panel) if name == series), default=0)
            for panel, series in (
                ("copy", "host to device"),
                ("product", model),
                ("attention", "torch"),
            )
        ]
        if not all(found):
            return None
        copy, product, attention = found
        return cls(
            copy_bytes_per_s=min(copy, read_bytes_per_s or copy),
            product_flop_per_s=product,
            attention_flop_per_s=attention,
        )

    def bound_s(self, work: Work) -> float:
        """See above."""
        return max(work.read_bytes / self.copy_bytes_per_s, self.compute_s(work))

    def compute_s(self, work: Work) -> float:
        """Of the computing alone."""
        return work.product_flop / self.product_flop_per_s + work.attention_flop / self.attention_flop_per_s


def work_of(
    geometry: ModelGeometry,
    *,
    num_tokens: int,
    read_bytes: int,
    hidden_rows: int,
    recompute_tokens: int,
    recompute_layers: int,
    is_prefill: bool = False,
) -> Work:
    """Of a plan.

    read_bytes: as counted by the restore. hidden_rows: (token, layer) pairs whose K and V are projected from hidden
    states that were read. Of the tokens behind `recompute_tokens`, `recompute_layers` layers go through a forward whose
    last layer is only a projection. `geometry` knows its feed-forward weights. `is_prefill`: all tokens go through all
    of every layer, as recomputation by an engine does.
    """
    width, kv_width = geometry.num_heads * geometry.head_size, geometry.num_kv_heads * geometry.head_size
    projection = 4.0 * geometry.hidden_size * kv_width
    layer = 2.0 * (2 * geometry.hidden_size * (width + kv_width) + geometry.ffn_weights)
    all_pairs = num_tokens * (num_tokens + 1) / 2
    if is_prefill:
        return Work(
            read_bytes=read_bytes,
            product_flop=num_tokens * geometry.num_layers * layer,
            attention_flop=4.0 * width * geometry.num_layers * all_pairs,
        )
    others = num_tokens - recompute_tokens
    whole = max(0, recompute_layers - 1)
    product = hidden_rows * projection
    product += recompute_tokens * ((geometry.num_layers - 1) * layer + projection)
    product += others * (whole * layer + (projection if recompute_layers else 0.0))
    first_pairs = recompute_tokens * (recompute_tokens + 1) / 2
    pairs = (geometry.num_layers - 1) * first_pairs + whole * (all_pairs - first_pairs)
    return Work(read_bytes=read_bytes, product_flop=product, attention_flop=4.0 * width * pairs)
