"""The diagram as an image."""

from __future__ import annotations

import sys

from experiments.common.diagram import drawing_of
from experiments.common.runner import main
from experiments.fig02_transformer.config import ARROWS, BOXES, ITEM

draw = drawing_of(ITEM, BOXES, ARROWS)

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--only-plots", ITEM.key]))
