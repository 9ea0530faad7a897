"""Figure 6: state is generated token by token and restored layer by layer."""

from __future__ import annotations

from experiments.common.diagram import Arrow, Box
from experiments.common.item import Item

BOXES = {
    "step": Box(x=14, y=38, text="a decode step:\none token, all layers", role="compute", width=22, height=9),
    "rows": Box(x=44, y=38, text="rows of one token\nper layer", role="save", height=9),
    "span": Box(x=82, y=38, text="a span:\n64 tokens, all layers", role="store", width=24, height=9),
    "chunk": Box(x=82, y=12, text="a chunk:\n64 tokens of one layer", role="store", width=24, height=9),
    "layer": Box(x=44, y=12, text="one layer,\nall tokens", role="save", height=9),
    "project": Box(x=14, y=12, text="projection of\nthe whole layer", role="compute", width=22, height=9),
}
ARROWS = (
    Arrow(start="step", stop="rows", text="save"),
    Arrow(start="rows", stop="span", text="collect 64"),
    Arrow(start="span", stop="chunk", text="put, layer by layer"),
    Arrow(start="chunk", stop="layer", text="read in order"),
    Arrow(start="layer", stop="project", text="restore"),
)
ITEM = Item(
    folder="fig06_order",
    title="Figure 6: saved token by token, restored layer by layer",
    claim="the order of saving is not that of restoring, so chunks are laid out for restoring",
    how="drawn, without numbers, in this project's words.",
    panels=(),
)
