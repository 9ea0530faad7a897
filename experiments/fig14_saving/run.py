"""States that there is no number of the paper's machine. What runs here is in `here.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.fig14_saving.config import ITEM


def measure(_: Context) -> Iterator[Row]:
    """One row for each of the paper's panels."""
    for panel in ITEM.panels:
        if panel.here_of is None:
            note = "not yet measured: the paper's models on its machine"
            yield Row(
                figure=ITEM.key,
                panel=panel.key,
                series="HCache",
                x="batch",
                y=None,
                unit="s",
                how="measured",
                note=note,
            )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
