"""Engines over several ranks for tests: real processes, gloo on loopback."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mii_hcache.engine.parallel.engine import ParallelEngine
from mii_hcache.engine.parallel.opening import open_parallel_engine
from mii_hcache.errors import RankLostError
from tests.engine.parallel.forked import ForkedRank


@contextlib.contextmanager
def parallel_engine(
    path: Path,
    size: int,
    *,
    on_lost: Callable[[RankLostError], None] = lambda error: None,
    dtype: str = "float32",
    num_blocks: int = 400,
    **settings: Any,
) -> Iterator[ParallelEngine]:
    """A poisoned engine over `size` ranks, forked ones; they are gone at the end."""
    with mock.patch("mii_hcache.engine.parallel.followers.subprocess.Popen", ForkedRank):
        engine = open_parallel_engine(
            str(path),
            size,
            on_lost=on_lost,
            progress=lambda what, num_done, num_all: None,
            dtype=dtype,
            num_blocks=num_blocks,
            **settings,
        )
    try:
        engine.poison_free_blocks()
        yield engine
    finally:
        engine.close()
        assert not any(is_running(pid) for pid in engine.followers.pids)


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until_gone(pids: list[int], within_s: float) -> float:
    """Seconds until all of them were gone; fails when they are not in time."""
    started_s = time.monotonic()
    while any(is_running(pid) for pid in pids):
        if time.monotonic() - started_s > within_s:
            raise AssertionError(f"still there after {within_s} s: {[pid for pid in pids if is_running(pid)]}")
        time.sleep(0.02)
    return time.monotonic() - started_s


def children_of(pid: int) -> list[int]:
    """Processes that a process started and that run."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{int(entry)}/stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry))
    return sorted(found)
