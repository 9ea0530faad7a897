"""Figure 2: a layer of a transformer, and where its state can be taken."""

from __future__ import annotations

from experiments.common.diagram import Arrow, Box
from experiments.common.item import Item

BOXES = {
    "in": Box(x=10, y=25, text="input of layer i"),
    "norm": Box(x=32, y=25, text="norm", width=12),
    "qkv": Box(x=52, y=25, text="Q, K, V projection", role="compute"),
    "attention": Box(x=76, y=25, text="attention", role="compute"),
    "ffn": Box(x=76, y=41, text="feed-forward", role="compute"),
    "out": Box(x=40, y=41, text="input of layer i + 1"),
    "hidden": Box(x=32, y=8, text="hidden state\nD values", role="save"),
    "kv": Box(x=64, y=8, text="K and V\n2 D values (MHA)", role="store"),
}
ARROWS = (
    Arrow(start="in", stop="norm"),
    Arrow(start="norm", stop="qkv"),
    Arrow(start="qkv", stop="attention"),
    Arrow(start="attention", stop="ffn"),
    Arrow(start="ffn", stop="out"),
    Arrow(start="norm", stop="hidden", text="HCache saves"),
    Arrow(start="qkv", stop="kv", text="KV offload saves", is_dashed=True),
    Arrow(start="hidden", stop="kv", text="product"),
)
ITEM = Item(
    folder="fig02_transformer",
    title="Figure 2: a layer, and where its state is taken (after the norm, here)",
    claim="K and V follow from the hidden state by one product",
    how="drawn, without numbers, as this project does it: the state is taken after the norm.",
    panels=(),
)
