"""A diagram has nothing to measure."""

from __future__ import annotations

import sys

from experiments.common.diagram import rows_of
from experiments.common.runner import main
from experiments.fig07_overview.config import ITEM

measure = rows_of(ITEM)

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
