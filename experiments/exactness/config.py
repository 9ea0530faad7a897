"""Exactness: does a restored conversation say what one says that never left? Not in the paper, which has "lossless"."""

from __future__ import annotations

from experiments.common.item import Item, Panel

NOISE = "other batches"
"""The same prompt, never evicted, run in other batches: what the engine differs by from itself."""
BOUND = "bound"
RESIDENT = "never evicted"

ITEM = Item(
    folder="exactness",
    title="Exactness: restored against never evicted",
    claim="a restored history gives the same tokens, and logits within the engine's own noise (the paper: lossless)",
    how="the real engine on the machine at hand. A history is computed once, saved by every method, evicted, its "
    "blocks filled with NaN, restored; then both contexts are given the same tokens one by one and their logits "
    "compared.",
    panels=(
        Panel(key="a", title="largest difference of a logit", x_label="model", y_label="logit", log_y=True),
        Panel(key="b", title="mean difference of a logit", x_label="model", y_label="logit", log_y=True),
        Panel(key="c", title="equal tokens", x_label="model", y_label="%", y_factor=100),
        Panel(key="d", title="flipped although the choice was clear", x_label="model", y_label="tokens"),
        Panel(key="e", title="L-Eval score", x_label="task", y_label="score"),
        Panel(key="f", title="equal L-Eval answers", x_label="task", y_label="%", y_factor=100),
    ),
    why="In 16 bit a matrix product of another shape rounds differently, so the same prompt in other batches already "
    "gives other logits: that is the measure. A token may differ only where the best two logits are closer than twice "
    "the bound (`mii_hcache/tools/limits.py`); in 32 bit all must be equal.",
)
