"""Threads that pause at random in the product's code: what hangs on their order shows in minutes instead of in CI.

    MII_HCACHE_CHAOS=0.0005 scripts/test.sh tests/storage tests/runtime

The number is the chance of a pause of up to `LONGEST_S` whenever a thread calls a function or returns from one: between
the release of one lock and the next, between a look and what is done about it. 0.0005 slows most tests two to five
times; 0.002 finds more, in a few of them. Tests are to pass with it: one that does not hangs on an order that nobody
has promised.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from pathlib import Path
from types import FrameType

CHANCE = "MII_HCACHE_CHAOS"
LONGEST_S = 0.02
_PRODUCT = str(Path(__file__).resolve().parents[1] / "mii_hcache") + os.sep


def begin_if_asked() -> None:
    """Once in each process of a test, before its threads start."""
    chance = float(os.environ.get(CHANCE) or 0.0)
    if not chance:
        return
    draw, pause = random.Random().random, time.sleep

    def may_pause(frame: FrameType, event: str, argument: object) -> None:
        if draw() < chance and frame.f_code.co_filename.startswith(_PRODUCT):
            pause(LONGEST_S * draw() ** 2)

    threading.setprofile(may_pause)
    sys.setprofile(may_pause)
