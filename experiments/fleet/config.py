"""Beyond the paper: what a fleet keeps of millions of conversations, what its disks and its bill say.

Every number that is assumed is in this file, with where it comes from. One GPU has one SSD, as in the paper's testbed
(four A100-40G, 256 GB of DRAM, four PM9A3 of 4 TB), and the fleet is so many of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.common.item import Item, Panel
from experiments.crossover.config import MODELS as KNOWN
from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.core.platforms import PLATFORMS

MODELS: Mapping[str, ModelGeometry] = {name: KNOWN[name] for name in ("Llama-2-7B", "Llama-3-8B")}
"""K and V twice as large as hidden states, and half as large."""
PLATFORM = PLATFORMS["a100-1ssd"]
METHOD_OF = {
    "Recomputation": "recompute",
    "KV Offload": "kv",
    "HCache-O": "hidden",
    "HCache": "hcache",
    "Auto": "auto",
}
"""The planner's method behind each series."""
TILE_TOKENS, CHUNK_TOKENS = 1024, 512

# --- per GPU ---------------------------------------------------------------------------------------------------------
ROUNDS_PER_S = 0.5
"""Assumed: about half of what the paper's A100 takes of 7B before it queues (its figure 9)."""
GPU_BYTES = 12e9
"""Assumed: memory that idle contexts may keep, as K and V, beside weights and running requests."""
DRAM_BYTES = 64e9
"""The paper's 256 GB over four GPUs."""
SSD_TB = 4
"""The paper's PM9A3 (its section 6)."""
SSD_SIZES_TB = (1, 2, 4, 8, 16, 32)
"""All assumed to read as fast: only space differs."""

# --- drives and prices -----------------------------------------------------------------------------------------------
DRIVE_WRITES_PER_DAY = 1.0
"""Assumed: what drives of the PM9A3's class are rated at, over `LIFE_DAYS` (the PM9D3a, its successor, is)."""
LIFE_DAYS = 5 * 365
"""Assumed, for DRAM too."""
GPU_PRICE_PER_H = 1.5
"""Dollars, assumed: an A100 rented for long."""
SSD_PRICE_PER_TB = 100.0
"""Dollars, assumed: enterprise drives bought by the rack."""
DRAM_PRICE_PER_GB = 4.0
"""Dollars, assumed. Power, network and the host are left out."""

# --- people ----------------------------------------------------------------------------------------------------------
THINK_MEDIAN_S, THINK_SIGMA = 120.0, 1.08
"""Between rounds of one sitting, log-normal. Mooncake's public conversation trace (an hour, 12,031 requests) has
requests that extend an earlier prompt after 123 s (median) and 483 s (of nine in ten); an hour says nothing of days."""
PAUSE_SHARE = 0.1
"""Assumed: one gap in ten is the end of a sitting."""
PAUSE_MEDIAN_S, PAUSE_SIGMA = 12 * 3600.0, 1.2
"""Assumed, log-normal: half come back within 12 hours, one in ten after more than 2.3 days. No public trace of
conversations that we know is that long."""

TIERS = ("GPU", "DRAM", "SSD", "nowhere")
"""Where a returning context is found: in the first that still has it."""

_SSD_AXIS = "SSD per GPU, TB"


def _panels(keys: str, model: str, image: str) -> tuple[Panel, ...]:
    titles = (
        (f"{model}: where history is found, {SSD_TB} TB", "method", "% of tokens", 100.0),
        ("found nowhere, recomputed", _SSD_AXIS, "% of tokens", 100.0),
        ("writes", _SSD_AXIS, "drive writes a day", 1.0),
        ("cost, a GPU's computing counted", _SSD_AXIS, "$ per million history tokens", 1.0),
        ("cost, a GPU's waiting counted too", _SSD_AXIS, "$ per million history tokens", 1.0),
        (f"time to bring a history back, {SSD_TB} TB", "of all returns", "s", 1.0),
    )
    return tuple(
        Panel(key=key, title=title, x_label=x_label, y_label=y_label, y_factor=factor, image=image)
        for key, (title, x_label, y_label, factor) in zip(keys, titles, strict=True)
    )


KEYS = {"Llama-2-7B": "abcdef", "Llama-3-8B": "ghijkl"}
"""Panels of each model, in the order of `_panels`."""
IMAGES = {"Llama-2-7B": "fleet_llama2", "Llama-3-8B": "fleet_llama3"}

ITEM = Item(
    folder="fleet",
    title="Beyond the paper: a fleet that keeps a million conversations",
    claim="what state is stored as decides how long a disk remembers, how fast it wears and what a history costs",
    how="simulated: synthetic conversations through an exact LRU over GPU memory, DRAM and SSDs (stack distances, all "
    "capacities at once), restores and their GPU time by the planner. Prices, think times and load are assumed "
    "(experiments/fleet/config.py); nothing queues.",
    panels=(
        *(panel for model, keys in KEYS.items() for panel in _panels(keys, model, IMAGES[model])),
        Panel(key="m", title="returns", x_label="time since the last round", y_label="% of returns", y_factor=100.0),
        Panel(
            key="n", title="LRU and Che", x_label="million tokens per GPU", y_label="% of tokens found", y_factor=100.0
        ),
    ),
    why="All contexts are one LRU: a fleet that sends each context to the machine that has it behaves so, on average. "
    "State is written through to the SSD once, when it is computed, and again when it was lost and computed again. No "
    "day and night, no busy hours, no contexts shared by many, and no drive that slows when it is full.",
)
