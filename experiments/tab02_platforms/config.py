"""Table 2: the platforms, by datasheet and as this project's profiles assume them."""

from __future__ import annotations

from experiments.common.item import Item, Panel

PLATFORM_OF = {"A100": "a100-dram", "A30": "a30-dram", "4090": "4090-dram", "L20": "l20-dram", "H800": "h800-dram"}

ITEM = Item(
    folder="tab02_platforms",
    title="Table 2: datasheet rates (paper) and the effective rates that our simulations assume",
    claim="five GPUs whose computing and transfer are balanced differently",
    how="not measured: the effective rates in core/platforms.py, which every simulated row uses.",
    here="a large 16-bit product, and a large copy.",
    inputs=("datasheet",),
    panels=(
        Panel(key="a", title="16-bit products", x_label="GPU", y_label="TFLOP/s", y_factor=1e-12),
        Panel(key="b", title="host to GPU", x_label="GPU", y_label="GB/s", y_factor=1e-9),
    ),
    why="The difference is what we assume to be out of reach, not an error. The series keeps the paper's name so "
    "that the two "
    "can be compared.",
)
