"""A rank other than 0: a process that loads its share of the model and does what rank 0 tells it, until it is told to
stop or rank 0 is gone."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports take seconds: first of all this process must be able to end
    import torch

    from mii_hcache.engine.parallel.group import RankGroup
    from mii_hcache.engine.ragged_engine import HCacheEngine
    from mii_hcache.runtime.following import FollowingState

BEAT_S = 1.0
EXIT_FAILED = 1
EXIT_ORPHANED = 3
"""Rank 0 is gone."""


class Life:
    """The line to rank 0 on which a follower says how it is, and by whose end it learns that rank 0 is gone."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._parent = os.getppid()
        threading.Thread(target=self._beat, name="hcache-life", daemon=True).start()

    def say(self, kind: str, words: Any) -> None:
        """Any thread. Ends the process when rank 0 is gone."""
        try:
            with self._lock:
                self._link.send((kind, words))
        except OSError:
            os._exit(EXIT_ORPHANED)

    def _beat(self) -> None:
        """Nobody says anything on this line but its end."""
        while True:
            try:
                if self._link.poll(BEAT_S):
                    self._link.recv_bytes()
            except (EOFError, OSError):
                os._exit(EXIT_ORPHANED)
            if os.getppid() != self._parent:  # a child of rank 0's may have inherited the other end
                os._exit(EXIT_ORPHANED)
            self.say("beat", None)


class _Relay(logging.Handler):
    """Warnings of this process reach rank 0's log."""

    def __init__(self, life: Life) -> None:
        super().__init__(logging.WARNING)
        self._life = life

    def emit(self, record: logging.LogRecord) -> None:
        self._life.say("log", (record.levelno, record.name, self.format(record)))


class Follower:
    """What command handlers get: this rank's engine, group and line for storage requests."""

    def __init__(self, engine: HCacheEngine, group: RankGroup, io: Connection) -> None:
        self.engine = engine
        self.group = group
        self.io = io
        """The other end of `Followers.io_links`: for a thread of its own."""
        self.state: FollowingState | None = None
        """This rank's share of saved state (`parallel.state`)."""
        self.at_end: list[Callable[[], None]] = []
        """Called, last one first, when rank 0 says that it is over."""
        self._output: torch.Tensor | None = None
        engine.model().logits_via = self._keep_output

    def _keep_output(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The layers ran; which logits are wanted is told next. Nobody looks at them here."""
        self._output = output
        return output.new_empty(len(rows), 0)

    def run_logits(self, rows: list[int]) -> None:
        """This rank's part of the logits of the last batch's rows."""
        import torch

        assert self._output is not None
        with torch.inference_mode():
            self.engine.model().joined_logits(self._output, torch.tensor(rows, device=self._output.device))


def main(arguments: Sequence[str]) -> int:
    """`rank size commands io life`: numbers, the last three of inherited sockets."""
    # they mean the server: rank 0 ends the others in order
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    rank, size, *sockets = (int(argument) for argument in arguments)
    commands, io, life_link = (Connection(number) for number in sockets)
    life = Life(life_link)
    logging.getLogger().addHandler(_Relay(life))
    try:
        _run(rank, size, commands, io, life)
    except EOFError:
        os._exit(EXIT_ORPHANED)
    except BaseException as error:
        traceback.print_exc()
        sys.stdout.flush()
        life.say("failed", f"{type(error).__name__}: {error}")
        os._exit(EXIT_FAILED)
    sys.stdout.flush()
    os._exit(0)  # threads of gloo and torch have nothing left to do, and no order to end in


def _run(rank: int, size: int, commands: Connection, io: Connection, life: Life) -> None:
    from mii_hcache.config import quiet_libraries

    quiet_libraries()
    import torch

    from mii_hcache.engine import compat
    from mii_hcache.engine.parallel import commands as stream
    from mii_hcache.engine.parallel import state  # noqa: F401 its commands are registered
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
    group = RankGroup.join(Path(settings["meeting"]), rank, size, device)
    life.say("state", "met")
    follower = Follower(build_engine(**settings["engine"], group=group), group, io)
    life.say("state", "ready")
    stream.follow(follower, commands)
    for end in reversed(follower.at_end):
        end()
