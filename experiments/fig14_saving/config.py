"""Figure 14: time between tokens while state is saved."""

from __future__ import annotations

from experiments.common.item import Item, Panel

_WORDS = {"x_label": "batch", "y_label": "ms", "y_factor": 1e3, "is_line": True}

ITEM = Item(
    folder="fig14_saving",
    title="Figure 14: time between tokens while hidden states are saved",
    claim="saving in two stages costs next to nothing, writing straight to SSDs up to a third",
    how="not yet measured: needs a GPU, decoding with the saver on.",
    panels=(Panel(key="a", title="7B", **_WORDS), Panel(key="b", title="13B", **_WORDS)),
    why="The paper's text has +34 % for 7B at batch 16; its figure shows 25 % there and 34 % at batch 18.",
)
