"""Assumed effective rates beside the paper's datasheet rates."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.tab02_platforms.config import ITEM, PLATFORM_OF
from mii_hcache.core.platforms import platform_named


def measure(_: Context) -> Iterator[Row]:
    """The same at every scale."""
    for gpu, name in PLATFORM_OF.items():
        platform = platform_named(name)
        rates = {"a": (platform.gemm_flop_per_s, "FLOP/s"), "b": (platform.h2d_bytes_per_s, "bytes/s")}
        for panel, (y, unit) in rates.items():
            yield Row(
                figure=ITEM.key,
                panel=panel,
                series="datasheet",
                x=gpu,
                y=y,
                unit=unit,
                how="simulated",
                machine=name,
                note=f"effective rate, assumed: {platform.source}",
            )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
