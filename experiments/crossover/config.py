"""Beyond the paper: which method restores fastest, over the shape of a model and the balance of a machine.

Two numbers decide nearly everything, and both are ratios of costs that every profile has:

    ratio    = IO_kv / IO_hidden    bytes of K and V over bytes of hidden states: 2 kv_heads head_size / hidden_size
    balance  = C_hidden / IO_kv     projecting K and V over loading them: 2 D B / (b F), with D hidden_size, b bytes of
                                    an element, B bytes/s that are read, F FLOP/s of matrix products

With the read of one hidden row as the unit of time, a token of a layer takes

    hidden states  max(1, ratio * balance)      K and V  ratio      recomputation  forward * balance

where `forward` counts a layer's FLOPs in units of 2 D^2. So hidden states beat K and V exactly where ratio > 1 and
balance < 1, and recomputation beats both where balance < min(1, ratio) / forward: straight lines. B over F alone would
not do: the same machine is D times better balanced for a model that is D times wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from experiments.common.item import Item, Panel
from mii_hcache.core.cost import HardwareProfile, LayerCost
from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.core.platforms import PLATFORMS

TOKENS, LONG_TOKENS = 4096, 32768
"""History that is restored; the long one shows what attention does to recomputation."""
TILE_TOKENS, CHUNK_TOKENS = 1024, 512
PURE = ("hidden", "kv", "recompute")
SERIES_OF = {"hidden": "HCache-O", "kv": "KV Offload", "recompute": "Recomputation"}
"""The colours that other figures give to these."""
RATIOS, BALANCES = (1 / 8, 4.0), (1 / 256, 8.0)
"""Ends of the axes: 5 and 11 octaves."""

_HIDDEN_SIZE, _NUM_LAYERS, _HEAD_SIZE = 4096, 32, 8
"""Of the nominal model, Llama-2-7B's; heads are small so that the ratio can be almost any number."""
_FFN_WEIGHTS = 3 * 4096 * 11008
_GEMM_FLOP_PER_S, _ATTENTION_FLOP_PER_S = 250e12, 180e12
"""Of the nominal machine, the A100 of core/platforms.py. Only their quotient matters on the map."""


def _model(
    layers: int, hidden: int, heads: int, kv_heads: int, head: int, ffn: int, *, matrices: int = 3
) -> ModelGeometry:
    return ModelGeometry(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head,
        dtype="float16",
        ffn_weights=matrices * hidden * ffn,
    )


MODELS: Mapping[str, ModelGeometry] = {
    "Llama-3-70B": _model(80, 8192, 64, 8, 128, 28672),
    "Qwen2.5-7B": _model(28, 3584, 28, 4, 128, 18944),
    "Llama-3-8B": _model(32, 4096, 32, 8, 128, 14336),
    "Mistral-7B": _model(32, 4096, 32, 8, 128, 14336),
    "Qwen3-8B": _model(36, 4096, 32, 8, 128, 12288),
    "Llama-2-7B": _model(32, 4096, 32, 32, 128, 11008),
    "Phi-3-mini": _model(32, 3072, 32, 32, 96, 8192),
    "OPT-30B": _model(48, 7168, 56, 56, 128, 28672, matrices=2),
    "Qwen3-0.6B": _model(28, 1024, 16, 8, 128, 3072),
    "Gemma-7B": _model(28, 3072, 16, 16, 256, 24576),
}
"""From their public configurations, 16-bit; by ratio."""

COLUMNS = tuple(name for name in PLATFORMS if name not in ("a100-4ssd", "a30-4ssd"))
"""Platforms of the tables. Those two read as fast as their twins on DRAM: PCIe is what limits both."""


def ratio_of(geometry: ModelGeometry) -> float:
    """Bytes of K and V over bytes of hidden states."""
    return 2 * geometry.num_kv_heads * geometry.head_size / geometry.hidden_size


def balance_of(geometry: ModelGeometry, platform: HardwareProfile) -> float:
    """Projecting K and V over loading them, by its first tier; links between GPUs are left out."""
    read = next(iter(platform.read_bytes_per_s.values()))
    bytes_per_s = min(read, platform.num_gpus * platform.h2d_bytes_per_s)
    flop_per_s = platform.num_gpus * platform.gemm_flop_per_s
    return 2 * geometry.hidden_size * bytes_per_s / (geometry.dtype_bytes * flop_per_s)


def nominal_model(ratio: float) -> ModelGeometry:
    """As wide as Llama-2-7B, with as many KV heads as the ratio asks for, to 1/256; beyond 2 as Gemma has it, with
    query heads that are wider together than the model."""
    num_kv_heads = max(1, round(ratio * _HIDDEN_SIZE / (2 * _HEAD_SIZE)))
    return ModelGeometry(
        num_layers=_NUM_LAYERS,
        hidden_size=_HIDDEN_SIZE,
        num_heads=max(_HIDDEN_SIZE // _HEAD_SIZE, num_kv_heads),
        num_kv_heads=num_kv_heads,
        head_size=_HEAD_SIZE,
        dtype="float16",
        ffn_weights=_FFN_WEIGHTS,
    )


def nominal_cost(ratio: float, balance: float) -> LayerCost:
    """Of the nominal model on a machine of this balance. Nothing takes time to start, so that rates alone decide."""
    bytes_per_s = balance * _GEMM_FLOP_PER_S / _HIDDEN_SIZE
    machine = HardwareProfile(
        name="nominal",
        source="rates with the quotients of an A100; no latencies",
        read_bytes_per_s={"any": bytes_per_s},
        h2d_bytes_per_s=bytes_per_s,
        gemm_flop_per_s=_GEMM_FLOP_PER_S,
        attention_flop_per_s=_ATTENTION_FLOP_PER_S,
    )
    return machine.layer_cost(nominal_model(ratio))


def forward(ratio: float, num_tokens: int) -> float:
    """A layer's FLOPs for one token of the nominal model, causal attention at this length included, over 2 D^2. A
    FLOP of attention counts as much more as it takes longer."""
    queries = max(1.0, ratio / 2)
    attention = queries * num_tokens / _HIDDEN_SIZE * _GEMM_FLOP_PER_S / _ATTENTION_FLOP_PER_S
    return 2 * queries + ratio + _FFN_WEIGHTS / _HIDDEN_SIZE**2 + attention


def predicted(ratio: float, balance: float, num_tokens: int) -> dict[str, float]:
    """What the formulas above give each pure method, in reads of a hidden row."""
    return {
        "hidden": max(1.0, ratio * balance),
        "kv": ratio,
        "recompute": forward(ratio, num_tokens) * balance,
    }


def recompute_below(ratio: float, num_tokens: int) -> float:
    """The balance below which nothing is as fast as recomputation."""
    return min(1.0, ratio) / forward(ratio, num_tokens)


def hidden_above(num_tokens: int) -> float:
    """The ratio above which hidden states make the best mix of K and V and recomputation faster, whatever the balance:
    where their point leaves the line between the other two, ratio / forward + 1 / ratio = 1."""
    others = forward(1.0, num_tokens) - 1.0
    return others / (others - 1.0)


def steps(ends: tuple[float, float], count: int) -> Iterator[float]:
    """Middles of so many equal parts of a logarithmic axis."""
    low, high = map(math.log, ends)
    return (math.exp(low + (high - low) * (idx + 0.5) / count) for idx in range(count))


_X, _Y = "bytes of K and V / bytes of hidden states", "projecting K and V / loading them"

ITEM = Item(
    folder="crossover",
    title="Beyond the paper: which method restores fastest, by model and machine (4,096 tokens)",
    claim="hidden states are the fastest pure method where K and V are larger than they (ratio > 1) and a projection "
    "is faster than a load (balance < 1), and any mix gains from them from a ratio of 1.1 on; most of today's grouped "
    "heads are below",
    how="simulated: the planner's own plans, priced by its two-resource timeline; the maps have no latencies, the "
    "table has those of core/platforms.py. Lines are formulas, drawn over it.",
    panels=(
        Panel(key="a", title="fastest pure method", x_label=_X, y_label=_Y),
        Panel(key="b", title="auto over the fastest pure method", x_label=_X, y_label=_Y),
        Panel(key="c", title="auto over K and V with recomputation", x_label=_X, y_label=_Y),
        Panel(
            key="d", title="4,096 tokens, on real shapes", x_label="platform", y_label="model", image="crossover_models"
        ),
        Panel(key="e", title="32,768 tokens", x_label="platform", y_label="model", image="crossover_models"),
    ),
    why="Boundaries: the 32 layers of a plan are whole, and layer 0 needs no read, so the planner's boundaries lie up "
    "to 3 % beside the lines. At 32,768 tokens attention makes a forward 1.7 times as dear as at 4,096, so that "
    "recomputation needs a machine that much worse balanced; the other boundary, balance = 1, knows no length.",
)
