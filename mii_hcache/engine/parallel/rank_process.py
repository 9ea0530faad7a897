"""The process of a rank other than 0: it loads its share of the model and does what rank 0 tells it, until it is told
to stop or rank 0 is gone."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from mii_hcache.engine.parallel.life import Life, Relay  # the rest takes seconds: see `_run`

EXIT_FAILED = 1
LAST_S = 1.0
"""Rank 0 ends a rank that says that it failed. If it failed because rank 0 is gone, its line ends within so long: a
process's lines do not all end at once."""


def main(arguments: Sequence[str]) -> int:
    """`rank size meeting commands io life`: where the ranks meet; the others are numbers, the last three of inherited
    sockets."""
    # they mean the server: rank 0 ends the others in order
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    rank, size, meeting = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    commands, io, life_link = (Connection(int(number)) for number in arguments[3:])
    life = Life(life_link, meeting)
    logging.getLogger().addHandler(Relay(life))
    try:
        _run(rank, size, meeting, commands, io, life)
    except EOFError:
        life.end_orphaned()
    except BaseException as error:
        with contextlib.suppress(OSError):  # nobody reads it any more
            traceback.print_exc()
            sys.stdout.flush()
        life.say("failed", f"{type(error).__name__}: {error}")
        time.sleep(LAST_S)
        os._exit(EXIT_FAILED)
    sys.stdout.flush()
    os._exit(0)  # threads of gloo and torch have nothing left to do, and no order to end in


def _run(rank: int, size: int, meeting: Path, commands: Connection, io: Connection, life: Life) -> None:
    from mii_hcache.config import quiet_libraries

    quiet_libraries()
    import torch

    from mii_hcache.engine import compat
    from mii_hcache.engine.parallel import commands as stream
    from mii_hcache.engine.parallel import state  # noqa: F401 its commands are registered
    from mii_hcache.engine.parallel.follower import Follower
    from mii_hcache.engine.parallel.group import RankGroup
    from mii_hcache.engine.parallel.opening import device_of, share_threads
    from mii_hcache.engine.ragged_engine import build_engine

    device = device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    share_threads(size)
    compat.install()
    life.say("state", "imported")
    settings = commands.recv()
    group = RankGroup.join(meeting, rank, size, device)
    life.say("state", "met")
    follower = Follower(build_engine(**settings["engine"], group=group), group, io)
    life.say("state", "ready")
    stream.follow(follower, commands)
    for end in reversed(follower.at_end):
        end()
