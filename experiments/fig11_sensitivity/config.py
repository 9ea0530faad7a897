"""Figure 11: restoration speed over GPUs, SSDs and context lengths."""

from __future__ import annotations

from dataclasses import replace

from experiments.common.item import Check, Item, Panel
from experiments.common.models import Deployment, deployed, with_gpus, with_ssds
from mii_hcache.core.platforms import PLATFORMS

METHODS = ("Recomputation", "KV Offload", "HCache")
TOKENS = 1024
"""Of panels a to f."""

_A100, _FOUR_A100 = PLATFORMS["a100-4ssd"], PLATFORMS["4xa100-4ssd"]
_H800 = PLATFORMS["h800-dram"]
_DRAM = {
    "A100": PLATFORMS["a100-dram"],
    "4090": PLATFORMS["4090-dram"],
    "A30": PLATFORMS["a30-dram"],
    "H800": _H800,
    "L20": PLATFORMS["l20-dram"],
    "4xA100": replace(with_gpus(PLATFORMS["a100-dram"], 4), name="4xa100-dram"),
    "2xH800": with_gpus(_H800, 2),
}

GPUS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a": ("Llama2-7B", ("A100", "4090", "A30")),
    "b": ("Llama2-13B", ("H800", "A100", "L20")),
    "c": ("OPT-30B", ("H800", "4xA100", "2xH800")),
}
SSDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "d": ("Llama2-7B", (1, 2, 3, 4)),
    "e": ("Llama2-13B", (1, 2, 3, 4)),
    "f": ("OPT-30B", (4, 8, 12, 16)),
}
CONTEXTS: dict[str, tuple[str, int]] = {"g": ("Llama2-7B", 16384), "h": ("Llama2-13B", 16384), "i": ("OPT-30B", 32768)}
"""Model and longest context; on the SSDs of the paper's testbed, four."""


def on_dram(model: str, gpu: str) -> Deployment:
    """Panels a to c."""
    return deployed(model, _DRAM[gpu])


def on_ssds(model: str, num_ssds: int) -> Deployment:
    """Panels d to i."""
    return deployed(model, with_ssds(_FOUR_A100 if model == "OPT-30B" else _A100, num_ssds))


def _panels(keys: str, models: dict[str, str], x_label: str, image: str, *, is_line: bool = False) -> list[Panel]:
    return [
        Panel(
            key=key,
            title=models[key],
            x_label=x_label,
            y_label="thousand tokens/s",
            y_factor=1e-3,
            is_line=is_line,
            image=f"fig11_{image}",
        )
        for key in keys
    ]


_MODELS = {key: value[0] for key, value in (*GPUS.items(), *SSDS.items(), *CONTEXTS.items())}

HERE_PANELS = {
    key: Panel(
        key=f"{key}-here",
        title=f"balance of {_MODELS[key]}",
        x_label=x_label,
        y_label="tokens/s",
        here_of=key,
        is_speed=True,
        is_line=key == "g",
        image="fig11_here",
    )
    for key, x_label in {
        "a": "GPU, host memory backend",
        "b": "GPU, host memory backend",
        "d": "SSDs",
        "e": "SSDs",
        "g": "tokens of history",
    }.items()
}
"""Of the machine at hand, by the paper's panel."""

ITEM = Item(
    folder="fig11_sensitivity",
    title="Figure 11: restoration speed over hardware, storage bandwidth and context length",
    claim="hidden states restore faster than K and V and than recomputation on every platform",
    how="simulated: the planner's own plans, timed by its two-resource model with assumed effective rates "
    "(core/platforms.py); nothing is fitted to this figure.",
    here="the real engine, saver, restorer and planner restore 1,024 tokens (panel g: its own lengths) of a small "
    "model; reads are throttled so that, over a layer's forward, they take as long as on each of the paper's "
    "platforms.",
    panels=(
        *_panels("abc", _MODELS, "GPU, host memory backend", "gpus"),
        *_panels("def", _MODELS, "SSDs", "ssds"),
        *_panels("ghi", _MODELS, "tokens of history", "context", is_line=True),
        *HERE_PANELS.values(),
    ),
    checks=(
        Check(
            text="GPUs: HCache over KV offload",
            numerator="HCache",
            denominator="KV Offload",
            low=1.33,
            high=1.81,
            panels=("a", "b", "c"),
            why="GPUs: ours are the ideal overlap, without the paper's 3 to 11 % of overhead, hence up to 2.0. In the "
            "paper's own panel c two H800 have 1.31, below the 1.33 of its text.",
        ),
        Check(
            text="GPUs, emulated balance: HCache over KV offload",
            numerator="HCache",
            denominator="KV Offload",
            low=1.33,
            high=1.81,
            panels=("a-here", "b-here"),
        ),
        Check(
            text="GPUs, emulated balance: HCache over recomputation",
            numerator="HCache",
            denominator="Recomputation",
            low=5.04,
            high=9.05,
            panels=("a-here", "b-here"),
            why="Emulated balance: a projection on a CPU core is further from its peak than a forward is, so hidden "
            "states cost more than a sixth of a recomputation there, and the ratios are lower.",
        ),
        Check(
            text="GPUs: HCache over recomputation",
            numerator="HCache",
            denominator="Recomputation",
            low=5.04,
            high=9.05,
            panels=("a", "b", "c"),
            why="GPUs: the paper's L20 recomputes 8,150 tokens/s of 13B, which is 205 TFLOP/s on a card of 120: "
            "that bar "
            "looks copied from the A100, and it gives 4.93, below the 5.04 of the text. Ours is lower, so the ratio "
            "there is higher.",
        ),
        Check(
            text="SSDs: HCache over KV offload",
            numerator="HCache",
            denominator="KV Offload",
            low=1.70,
            high=2.66,
            panels=("d", "e", "f"),
        ),
        Check(
            text="SSDs, emulated balance: HCache over KV offload",
            numerator="HCache",
            denominator="KV Offload",
            low=1.70,
            high=2.66,
            panels=("d-here", "e-here"),
        ),
        Check(
            text="SSDs, emulated balance: HCache over recomputation",
            numerator="HCache",
            denominator="Recomputation",
            low=2.3,
            high=6.1,
            panels=("d-here", "e-here"),
        ),
        Check(
            text="SSDs: HCache over recomputation",
            numerator="HCache",
            denominator="Recomputation",
            low=2.3,
            high=6.1,
            panels=("d", "e", "f"),
            why="SSDs: the paper's own panel f reaches 8.43 with 16 disks, above the 6.1 of its text. OPT-30B on "
            "four GPUs "
            "recomputes slower in the paper than tensor parallelism at our assumed rates (10.4 against 14 thousand "
            "tokens/s), and its K and V arrive at 19 GB/s from four SSDs of 27.6: what its GPUs lose together is "
            "not known, "
            "and our panels f and i are therefore 30 to 55 % above.",
        ),
    ),
    why="Context: recomputation of 7B falls by 27 % from 1K to 16K in the paper. Attention of N^2 D operations, as its "
    "equation 8 has it, would give 13 %; causal attention is twice that, which is what we count.",
)
