"""Figure 8: two ways to mix hidden states with K and V, in the paper a sketch of 6 layers and 3 tokens."""

from __future__ import annotations

from experiments.common.item import Item
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import ModelGeometry

GEOMETRY = ModelGeometry(
    num_layers=6, hidden_size=64, num_heads=4, num_kv_heads=4, head_size=16, dtype="float16", ffn_weights=3 * 64 * 128
)
NUM_SPANS = 3
"""The sketch has tokens; a span is the least that can be stored on its own."""
COST = LayerCost(io_hidden_s=0.5, io_kv_s=1.0, c_hidden_s=1.0, c_token_s=6.0)
"""Made up, in units of projecting one row: K and V take twice the bytes of hidden states, and computing is slower than
reading, so two thirds should be hidden states."""
WAYS = {"by tokens": "token-wise", "by layers": "hcache"}
"""The planner's methods."""

ITEM = Item(
    folder="fig08_partition",
    title="Figure 8: two ways to mix hidden states with K and V (6 layers, 3 spans)",
    claim="a split by layers needs no waiting between layers, one by tokens mixes both kinds in each of them",
    how="simulated: the planner's own storage plans for a made-up machine, and their timelines, cell by cell. The "
    "paper's figure is a sketch; it has no numbers.",
    panels=(),
)
