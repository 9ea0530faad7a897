"""The bars as images."""

from __future__ import annotations

import sys
from functools import partial

from experiments.common.plotting import side_by_side
from experiments.common.runner import main
from experiments.fig01_methods.config import ITEM

draw = partial(side_by_side, ITEM)

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--only-plots", ITEM.key]))
