"""Rank 0's view of the other ranks: processes that it starts, watches and ends.

Each follower holds one end of three socket pairs, which nobody else can reach: commands (`commands.py`), storage
requests (`io`), and life, over which it says what it does, what it logs, and that it is still there. A thread of
rank 0's waits on the life of all of them, whatever the engine's thread hangs in: the first rank that is gone, or says
nothing for `SILENCE_S`, ends them all, and the server.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import multiprocessing.connection
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mii_hcache.engine.parallel.group import TIMEOUT_S
from mii_hcache.errors import RankLostError

_log = logging.getLogger(__name__)

SILENCE_S = 20.0
"""A rank that says nothing for so long hangs; a beat comes every second."""
SILENCE_AT_START_S = 120.0
"""The same while it loads: an import may hold all of Python up."""
END_S = 5.0
"""Longest that followers may take to end by themselves."""
VERDICT_S = 2.0
"""How long who met an error waits to hear which rank is behind it, at least."""
TAIL_LINES = 12
"""Last lines of a follower's output that are told when it died."""
_LOOK_S = 0.5
_REAP_S = 3.0
"""Longest that a process takes to end when its lines are closed."""
_LAST_WORDS_S = 1.0
"""Longest that its last words are on their way: who it started may hold its output open."""
_SEND_BUFFER_BYTES = 4 << 20


@dataclass(eq=False, kw_only=True)
class FollowerProcess:
    """One other rank, as rank 0 sees it."""

    rank: int
    process: subprocess.Popen[bytes]
    commands: Connection
    io: Connection
    life: Connection
    state: str = "starting"
    """What it said last: `starting`, `imported`, `met`, `ready`, `gone`."""
    heard_s: float = field(default_factory=time.monotonic)
    tail: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=TAIL_LINES))
    reader: threading.Thread = field(init=False)
    """Adds to `tail` what the process prints, and ends when it does."""
    failure: str | None = None
    """Why it ends, in its own words."""

    def __post_init__(self) -> None:
        name = f"hcache-rank-{self.rank}-log"
        self.reader = threading.Thread(target=_keep_tail, args=(self,), name=name, daemon=True)
        self.reader.start()


class Followers:
    """Ranks 1 to `size - 1`. Any thread may call."""

    def __init__(self, size: int, on_lost: Callable[[RankLostError], None] = lambda error: None) -> None:
        """Starts the processes; they import what they need and wait for `settings`. `on_lost` is called once, from the
        watching thread, with why the engine is lost; by then the others have been killed."""
        self.size = size
        self.meeting = Path(tempfile.mkdtemp(prefix="mii-hcache-ranks-"))
        """Where the ranks meet; nobody else may look into it."""
        self._on_lost = on_lost
        self._wake: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._error: RankLostError | None = None
        self._is_ending = False
        self._has_ended = False
        self._ending = threading.Lock()
        """One thread at a time ends them."""
        self._num_looks = 0
        """How often the watching thread heard all that was said."""
        self._members: list[FollowerProcess] = []
        self._watcher = threading.Thread(target=self._watch, name="hcache-ranks", daemon=True)
        try:
            for rank in range(1, size):
                self._members.append(self._start(rank))
        except BaseException:
            self._kill()
            shutil.rmtree(self.meeting, ignore_errors=True)
            raise
        self._watcher.start()

    def _start(self, rank: int) -> FollowerProcess:
        pairs = [socket.socketpair() for _ in range(3)]
        try:
            arguments = [rank, self.size, self.meeting, *(pair[1].fileno() for pair in pairs)]
            process = subprocess.Popen(
                [sys.executable, "-m", "mii_hcache.engine.parallel", *map(str, arguments)],
                pass_fds=[pair[1].fileno() for pair in pairs],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for rank 0, which then ends the others in order
                env=_environment(),
            )
        finally:
            for pair in pairs:
                pair[1].close()
        commands, io, life = (_connection(pair[0]) for pair in pairs)
        return FollowerProcess(rank=rank, process=process, commands=commands, io=io, life=life)

    # --- talking ------------------------------------------------------------------------------------------------

    @property
    def command_links(self) -> list[Connection]:
        """For `CommandStream`."""
        return [member.commands for member in self._members]

    @property
    def io_links(self) -> list[Connection]:
        """To the threads of the followers that serve storage requests, rank 1 first. Who uses one is its only user."""
        return [member.io for member in self._members]

    @property
    def pids(self) -> list[int]:
        """Of the followers, rank 1 first."""
        return [member.process.pid for member in self._members]

    def send_settings(self, settings: dict[str, Any]) -> None:
        """What a follower needs to load its share. Before any command. Raises RankLostError."""
        for link in self.command_links:
            try:
                link.send(settings)
            except OSError as error:
                raise self._await_verdict(f"a rank takes no settings: {error}") from error

    def wait_for(self, state: str, progress: Callable[[int], None] = lambda num_there: None) -> None:
        """Until all followers are in `state`; `progress` hears how many are. Raises RankLostError."""
        while True:
            with self._changed:
                self.check()
                num_there = sum(member.state == state for member in self._members)
                if num_there < len(self._members):
                    self._changed.wait(_LOOK_S)
            progress(num_there)
            if num_there == len(self._members):
                return

    def states(self) -> dict[int, str]:
        """What each rank does, by its number: `starting`, `imported`, `ready`, `gone`; rank 0 is always there."""
        return {0: "ready", **{member.rank: member.state for member in self._members}}

    # --- losing -------------------------------------------------------------------------------------------------

    @property
    def error(self) -> RankLostError | None:
        """Why the engine is lost."""
        return self._error

    def check(self) -> None:
        """Raises RankLostError, with the reason, once the engine is lost."""
        if self._error is not None:
            raise RankLostError(str(self._error))

    def lose(self, reason: str, error: BaseException | None = None) -> RankLostError:
        """Something failed in a way that no rank can go on from. Returns why the engine is lost: what happened to
        another rank, if that is behind it."""
        if isinstance(error, RankLostError):
            return self._await_verdict(reason)
        self._give_up(reason)
        return RankLostError(str(self._error))

    def _await_verdict(self, reason: str) -> RankLostError:
        """A collective or a socket failed: the watching thread knows in a moment which rank is gone."""
        stop_s = time.monotonic() + VERDICT_S
        with self._changed:
            stop_looks = self._num_looks + 2  # the first may have begun before; this process may have stood still since
            while self._error is None and self._watcher.is_alive():
                if self._num_looks >= stop_looks and time.monotonic() > stop_s:
                    break
                self._changed.wait(0.05)
        self._give_up(reason)
        return RankLostError(str(self._error))

    def wake_with(self, wake: Callable[[], None]) -> None:
        """`wake` is called, on a thread of its own, when a rank is lost, or if one is: it ends what still waits for the
        others, who have been killed by then."""
        with self._changed:
            self._wake = wake
            is_lost = self._error is not None
        if is_lost:
            wake()

    def _give_up(self, reason: str) -> None:
        """The first reason counts."""
        with self._changed:
            if self._error is not None or self._is_ending:
                self._error = self._error or RankLostError(reason)
                return
            self._error = RankLostError(reason)
            self._changed.notify_all()
        self._kill()  # first of all: whoever waits for a rank that hangs is woken by its end
        _log.critical("%s", reason)
        for what in (self._wake, partial(self._on_lost, self._error)):  # neither waits for the other
            threading.Thread(target=what, name="hcache-ranks-lost", daemon=True).start()

    def _watch(self) -> None:
        try:
            self._look()
        except Exception as error:
            _log.exception("the ranks cannot be watched any more")
            self._give_up(f"rank 0 cannot watch the others any more: {error}")
        finally:
            for member in self._members:
                member.life.close()

    def _look(self) -> None:
        """Until all are gone."""
        looked_s = time.monotonic()
        while True:
            with self._changed:
                members = [member for member in self._members if member.state != "gone"]
            if not members or self._has_ended:
                return
            for link in multiprocessing.connection.wait([member.life for member in members], _LOOK_S):
                self._hear(next(member for member in members if member.life is link))
            now_s = time.monotonic()
            if now_s - looked_s > 5 * _LOOK_S:  # this process stood still: so may have what the others said
                for member in members:
                    member.heard_s = now_s
            looked_s = now_s
            for member in members:
                silence_s = SILENCE_S if member.state == "ready" else SILENCE_AT_START_S
                if member.state != "gone" and now_s - member.heard_s > silence_s and not self._is_ending:
                    self._give_up(f"{self._name(member)} hangs: nothing was heard of it for {silence_s:.0f} s")
            self._num_looks += 1

    def _hear(self, member: FollowerProcess) -> None:
        """All that it said so far."""
        try:
            while member.life.poll():
                self._take(member, *member.life.recv())
        except (EOFError, OSError):
            self._bury(member)

    def _take(self, member: FollowerProcess, kind: str, said: Any) -> None:
        member.heard_s = time.monotonic()
        if kind == "state":
            with self._changed:
                member.state = said
                self._changed.notify_all()
        elif kind == "log":
            level, name, words = said
            logging.getLogger(name).log(level, "rank %d: %s", member.rank, words)
        elif kind == "failed":
            member.failure = said
            with contextlib.suppress(ProcessLookupError):
                member.process.kill()  # it waits for that, or for the end of this process

    def _bury(self, member: FollowerProcess) -> None:
        """Its end of the line is closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.process.wait(_REAP_S)
        with self._changed:
            member.state = "gone"
            self._changed.notify_all()
        if not self._is_ending:
            self._give_up(f"{self._name(member)} {_how_it_ended(member)}")

    def _name(self, member: FollowerProcess) -> str:
        return f"rank {member.rank} of {self.size} (process {member.process.pid})"

    def _kill(self) -> None:
        for member in self._members:
            with contextlib.suppress(ProcessLookupError):
                member.process.kill()

    # --- ending -------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """They are about to be told to stop: from here on one that is gone is no loss."""
        with self._changed:
            self._is_ending = True

    def end(self) -> None:
        """The followers were told to stop, or nobody needs them: returns when they are gone. Idempotent."""
        self.let_go()
        with self._ending:
            self._end()

    def _end(self) -> None:
        stop_s = time.monotonic() + (END_S if self._error is None else 0.0)
        for member in self._members:
            with contextlib.suppress(OSError):
                member.commands.close()  # one that was told nothing ends by that, too
            with contextlib.suppress(subprocess.TimeoutExpired):
                member.process.wait(max(0.0, stop_s - time.monotonic()))
        self._kill()
        for member in self._members:
            member.process.wait()
        self._has_ended = True
        if self._watcher is not threading.current_thread() and self._watcher.is_alive():
            self._watcher.join(5 * _LOOK_S)  # who reads a line hears its end, and then lets go of it
        shutil.rmtree(self.meeting, ignore_errors=True)


def _environment() -> dict[str, str]:
    """Ours, and this very package is found."""
    package = str(Path(__file__).resolve().parents[3])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}


def _connection(sock: socket.socket) -> Connection:
    """Of rank 0's end. A send that finds no room for so long finds a rank that hangs."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(TIMEOUT_S), 0))
    return Connection(sock.detach())


def _keep_tail(member: FollowerProcess) -> None:
    """Reads what a follower prints, for as long as it does."""
    assert member.process.stdout is not None
    with member.process.stdout as lines:
        for line in lines:
            words = line.decode(errors="replace").rstrip()
            member.tail.append(words)
            _log.info("rank %d prints: %s", member.rank, words)


def _how_it_ended(member: FollowerProcess) -> str:
    code = member.process.poll()
    if member.failure is not None:
        return f"failed: {member.failure}"
    if code is None:
        return "closed its line"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"
    member.reader.join(_LAST_WORDS_S)
    told = "".join(f"\n  {line}" for line in list(member.tail))
    return f"ended with status {code}; its last words:{told or ' none'}"
