"""Restoration speed by every method on the three machines of the ablation."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.simulator import speed, stored
from experiments.fig12_ablation.config import COLUMNS, ITEM, METHODS, TOKENS


def measure(_: Context) -> Iterator[Row]:
    """The same at every scale: it takes a second."""
    for column, deployment in COLUMNS.items():
        for series in METHODS:
            yield Row(
                figure=ITEM.key,
                series=series,
                x=column,
                y=speed(deployment, series, TOKENS),
                unit="tokens/s",
                how="simulated",
                machine=column,
                note=f"stored as {stored(deployment, series).summary}; {deployment.basis}",
            )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
