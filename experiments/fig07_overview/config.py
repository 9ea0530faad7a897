"""Figure 7: the parts of the system and what flows between them."""

from __future__ import annotations

from experiments.common.diagram import Arrow, Box
from experiments.common.item import Item

BOXES = {
    "requests": Box(x=12, y=40, text="requests"),
    "scheduler": Box(x=42, y=40, text="MII scheduler", role="compute"),
    "engine": Box(x=80, y=40, text="engine: blocks, layers", role="compute", width=26),
    "planner": Box(x=12, y=24, text="planner\n(what, and from where)", width=22, height=9),
    "restorer": Box(x=42, y=24, text="restorer\nreads | projections", role="save", height=9),
    "saver": Box(x=80, y=24, text="saver\nsnapshot, flush", role="save", height=9),
    "profile": Box(x=12, y=8, text="measured costs"),
    "store": Box(x=61, y=8, text="chunk stores: memory, files; catalog", role="store", width=44),
}
ARROWS = (
    Arrow(start="requests", stop="scheduler"),
    Arrow(start="scheduler", stop="engine", text="steps"),
    Arrow(start="scheduler", stop="restorer", text="restore first"),
    Arrow(start="planner", stop="restorer", text="plan"),
    Arrow(start="profile", stop="planner"),
    Arrow(start="store", stop="restorer", text="hidden, kv"),
    Arrow(start="restorer", stop="engine", text="K and V into blocks"),
    Arrow(start="engine", stop="saver", text="hidden rows"),
    Arrow(start="saver", stop="store", text="full chunks"),
)
ITEM = Item(
    folder="fig07_overview",
    title="Figure 7: what flows in mii_hcache",
    claim="a saver beside decoding, a restorer ahead of prefill, one store and one planner",
    how="drawn, without numbers, as this project is built.",
    panels=(),
)
