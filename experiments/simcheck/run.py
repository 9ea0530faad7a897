"""Computes nothing: all of it runs on the machine at hand, see `here.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.simcheck.config import ITEM


def measure(_: Context) -> Iterable[Row]:
    """Nothing."""
    return ()


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
