"""Figure 5: how reading and computing overlap in a restore, layer by layer, and where bubbles are."""

from __future__ import annotations

from experiments.common.item import Item, Panel
from experiments.fig12_ablation.config import COLUMNS

TOKENS = 1024
TIMELINES = {
    "hidden only, computing is slower": ("HCache-O", COLUMNS["A30 7B 4 SSD"]),
    "hidden only, reading is slower": ("HCache-O", COLUMNS["A100 7B 1 SSD"]),
    "scheduled, computing is slower": ("HCache", COLUMNS["A30 7B 4 SSD"]),
    "scheduled, reading is slower": ("HCache", COLUMNS["A100 7B 1 SSD"]),
}
"""Series and deployment of each strip."""

HERE_SERIES = ("KV Offload", "HCache-O", "HCache")
HERE = Panel(
    key="here",
    title="real restores",
    x_label="method, balance of",
    y_label="share of the time, %",
    y_factor=100,
    image="fig05_here",
)

ITEM = Item(
    folder="fig05_pipeline",
    title="Figure 5: a pipelined restore, layer by layer (7B, 1,024 tokens)",
    claim="hidden states alone leave the faster resource idle; the schedule fills it",
    how="simulated: the plan's own timeline on costs fitted to the paper's machines (figure 12). The paper's figure "
    "is a "
    "sketch; it has no numbers.",
    here="what the real restorer's timelines say: reading, computing, and the bubble in which the busier of "
    "both waits.",
    panels=(HERE,),
)
