"""What rank 0 knows of other ranks, here processes that only talk: why one ended, in its words, however busy it is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from mii_hcache.engine.parallel import followers, opening
from mii_hcache.engine.parallel.followers import Followers
from mii_hcache.engine.parallel.group import RankGroup
from mii_hcache.engine.parallel.life import EXIT_ORPHANED, MEETING_FILE
from mii_hcache.engine.parallel.rank_process import EXIT_FAILED
from mii_hcache.errors import RankLostError
from tests.engine.parallel.ranks_kit import is_running, wait_until_gone

ROOT = Path(__file__).resolve().parents[3]
PREAMBLE = """
import os, sys, time
from multiprocessing.connection import Connection
rank, size = map(int, sys.argv[1:3])
commands, io, life = (Connection(int(number)) for number in sys.argv[4:])
life.send(("state", "ready"))
"""
UNTIL_THE_END = """
try:
    commands.recv()
except EOFError:
    pass
"""


@contextmanager
def ranks(size: int, program: str = UNTIL_THE_END, on_lost: Callable[[RankLostError], None] = lambda error: None):
    """Ranks that say that they are ready and then run a program; they are gone at the end."""
    popen = subprocess.Popen

    def start(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-c", PREAMBLE + program, *command[3:]], **settings)

    with mock.patch.object(subprocess, "Popen", start):
        others = Followers(size, on_lost)
    try:
        yield others
    finally:
        others.end()
        assert not any(is_running(pid) for pid in others.pids)


@pytest.fixture
def died(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What threads ended by."""
    told: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(f"{args.thread}: {args.exc_value}"))
    yield told


def lost_of(others: Followers) -> str:
    stop_s = time.monotonic() + 60
    while others.error is None:
        assert time.monotonic() < stop_s, "nobody noticed"
        time.sleep(0.005)
    return str(others.error)


def test_last_words_are_told_though_they_come_late(monkeypatch):
    keep_tail = followers._keep_tail

    def keep_tail_late(member: Any) -> None:
        time.sleep(0.4)
        keep_tail(member)

    monkeypatch.setattr(followers, "_keep_tail", keep_tail_late)
    with ranks(2, "print('one'); print('two', flush=True); sys.exit(7)") as others:
        told = lost_of(others)
    assert "rank 1 of 2" in told and told.endswith("ended with status 7; its last words:\n  one\n  two")


def test_who_holds_the_output_of_one_that_ended_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(followers, "_LAST_WORDS_S", 0.1)
    program = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.exit(7)"
    with ranks(2, program) as others:
        told = lost_of(others)
    pid = int(told.split()[-1])
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("program", ["life.send(('failed', 'out of memory')); sys.exit(1)", "os.kill(os.getpid(), 9)"])
def test_what_failed_here_is_told_by_the_rank_that_is_behind_it(monkeypatch, program):
    """Also when this process stood still for longer than it waits to hear of one."""
    monkeypatch.setattr(followers, "VERDICT_S", 0.01)
    listens, listen = threading.Event(), followers.multiprocessing.connection.wait

    def listen_late(links: Any, timeout: float) -> Any:
        listens.wait(30)
        return listen(links, timeout)

    monkeypatch.setattr(followers.multiprocessing.connection, "wait", listen_late)
    with ranks(2, program) as others:
        threading.Timer(0.3, listens.set).start()
        told = str(others.lose("rank 0 failed: connection reset", RankLostError("connection reset")))
    assert "rank 1 of 2" in told and ("out of memory" in told or "SIGKILL" in told)


def test_a_rank_that_failed_is_not_waited_for():
    with ranks(2, "life.send(('failed', 'out of memory')); time.sleep(600)") as others:
        told = lost_of(others)
        wait_until_gone(others.pids, 30)
    assert told.endswith("failed: out of memory")


@pytest.mark.parametrize(("is_there", "holds_more"), [(True, False), (False, False), (False, True)])
def test_a_rank_that_failed_because_rank_0_is_gone_leaves_nothing_behind(tmp_path, is_there, holds_more):
    """Lines do not all end at once: it may fail before it can know why."""
    program = (
        "import sys; from mii_hcache.engine.parallel import rank_process\n"
        "def fail(*args): raise ConnectionError('reset by peer')\n"
        "rank_process._run = fail; rank_process.main(sys.argv[1:])"
    )
    meeting = tmp_path / "ranks"
    meeting.mkdir()
    (meeting / MEETING_FILE).touch()
    if holds_more:  # somebody started it by hand, with a folder of his
        (meeting / "letter").touch()
    pairs = [multiprocessing.Pipe() for _ in range(3)]
    theirs = [pair[1].fileno() for pair in pairs]
    command = [sys.executable, "-c", program, "1", "2", str(meeting), *map(str, theirs)]
    process = subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.close()
    for pair in pairs:
        pair[1].close()
    life = pairs[2][0]
    while (said := life.recv())[0] == "beat":
        pass
    assert said == ("failed", "ConnectionError: reset by peer")
    if not is_there:
        life.close()
    assert process.wait(30) == (EXIT_FAILED if is_there else EXIT_ORPHANED)
    assert meeting.exists() == (is_there or holds_more)
    assert (meeting / "letter").exists() == holds_more


def test_an_error_that_no_rank_is_behind_is_told_as_it_is(monkeypatch):
    monkeypatch.setattr(followers, "VERDICT_S", 0.1)
    with ranks(2) as others:
        assert str(others.lose("nobody came", RankLostError("nobody came"))) == "nobody came"
        wait_until_gone(others.pids, 30)


def test_who_listens_when_all_is_over_is_let_finish(monkeypatch, died):
    """He may stand still for longer than he is waited for."""
    monkeypatch.setattr(followers, "_LOOK_S", 0.01)
    listens, looks, listen = threading.Event(), threading.Event(), followers.multiprocessing.connection.wait

    def listen_late(links: Any, timeout: float) -> Any:
        looks.set()
        listens.wait(30)
        return listen(links, timeout)

    with ranks(2) as others:
        others.wait_for("ready")
        monkeypatch.setattr(followers.multiprocessing.connection, "wait", listen_late)
        assert looks.wait(30)
        others.end()
        listens.set()
        others._watcher.join(30)
        assert others.error is None and not died
    assert all(member.life.closed for member in others._members)


def test_two_may_end_them_at_once():
    class Line:
        """Closed by one at a time."""

        def __init__(self) -> None:
            self.num_inside = self.most_inside = 0

        def close(self) -> None:
            self.num_inside += 1
            self.most_inside = max(self.most_inside, self.num_inside)
            time.sleep(0.1)
            self.num_inside -= 1

    with ranks(2) as others:
        commands, line = others._members[0].commands, Line()
        others._members[0].commands = line
        commands.close()
        threads = [threading.Thread(target=others.end) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert line.most_inside == 1 and others.error is None


def test_one_that_says_what_nobody_understands_ends_them_all():
    with ranks(3, "life.send('hm?') if rank == 2 else None" + UNTIL_THE_END) as others:
        assert "cannot watch the others any more" in lost_of(others)
        others._watcher.join(30)


def test_the_meeting_place_is_there_until_nobody_looks_for_it(monkeypatch):
    """In native code one would wait for a place that is gone."""
    told: list[str] = []

    def join(directory: Path, *args: Any, check: Callable[[], None]) -> RankGroup:
        try:
            while True:
                check()
        except RankLostError:
            time.sleep(0.2)  # on a busy machine
            told.append("left")
            raise

    def check() -> None:
        raise RankLostError("rank 1 of 2 was killed")

    monkeypatch.setattr(RankGroup, "join", join)
    with pytest.raises(RankLostError, match="was killed"):
        opening._meet(SimpleNamespace(meeting=Path(), check=check), 2)
    assert told == ["left"]
