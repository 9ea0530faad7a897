"""Disks that fail as a test says, whichever backend reads and writes."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from mii_hcache.storage.file import FileStore
from mii_hcache.storage.uring import NativeIO

HANG_S = 0.25
"""Deadline of a disk that hangs as a test says."""
Fault = Callable[[bool, int, int], "int | None"]
"""(is_write, offset, num_bytes) of an attempt: None lets it pass, else a negative errno, or how many bytes to move."""


def inject(monkeypatch: pytest.MonkeyPatch, store: FileStore, fault: Fault) -> None:
    """Ask `fault` before every transfer of a store, until the test ends or `monkeypatch` is undone."""
    if isinstance(store.io, NativeIO):
        monkeypatch.setattr(store.io.device, "fault", fault)  # slots; segments' headers are written as below
    preadv, pwritev = os.preadv, os.pwritev

    def faulty_preadv(fd, buffers, offset):
        verdict = _ask(fault, False, offset, buffers)
        if verdict is None:
            return preadv(fd, buffers, offset)
        left, cut = verdict, []
        for buffer in buffers:
            cut.append(buffer[:left])
            left -= len(cut[-1])
        return preadv(fd, [buffer for buffer in cut if len(buffer)], offset) if verdict else 0

    def faulty_pwritev(fd, buffers, offset):
        verdict = _ask(fault, True, offset, buffers)
        if verdict is None:
            return pwritev(fd, buffers, offset)
        return pwritev(fd, [b"".join(buffers)[:verdict]], offset) if verdict else 0

    monkeypatch.setattr(os, "preadv", faulty_preadv)
    monkeypatch.setattr(os, "pwritev", faulty_pwritev)


def _ask(fault: Fault, is_write: bool, offset: int, buffers: list[memoryview]) -> int | None:
    verdict = fault(is_write, offset, sum(len(buffer) for buffer in buffers))
    if verdict is not None and verdict < 0:
        raise OSError(-verdict, os.strerror(-verdict))
    return verdict


def interrupt_writes(monkeypatch: pytest.MonkeyPatch, store: FileStore) -> None:
    """Ctrl-C arrives while a write is waited for."""

    def interrupted(*_):
        raise KeyboardInterrupt

    if isinstance(store.io, NativeIO):
        monkeypatch.setattr(store.io, "_wait_all", interrupted)
    else:
        monkeypatch.setattr(os, "pwritev", interrupted)


class FullDisk:
    """Writes past `limit_bytes` of a file fail, after writing what fits: a disk without room for growth."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, store: FileStore, limit_bytes: int, code: int = errno.ENOSPC
    ) -> None:
        self.limit_bytes, self.num_refused, self._code = limit_bytes, 0, code
        inject(monkeypatch, store, self)

    def __call__(self, is_write: bool, offset: int, num_bytes: int) -> int | None:
        if not is_write or offset + num_bytes <= self.limit_bytes:
            return None
        if offset < self.limit_bytes:
            return self.limit_bytes - offset
        self.num_refused += 1
        return -self._code


class SlowDisk:
    """Holds reads back until told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: FileStore) -> None:
        self.is_reading, self.may_read = threading.Event(), threading.Event()
        self._deadline_s = time.monotonic() + 60
        self._is_ring = isinstance(store.io, NativeIO)
        inject(monkeypatch, store, self)

    def __call__(self, is_write: bool, offset: int, num_bytes: int) -> int | None:
        if is_write:
            return None
        self.is_reading.set()
        if self._is_ring and not self.may_read.is_set() and time.monotonic() < self._deadline_s:
            from mii_hcache._io import HOLD

            return HOLD  # a ring's one thread may not block: that would hold up writes as well
        return None if self.may_read.wait(60) else -errno.ETIMEDOUT


class DeadDisk:
    """The disk of one store, which fails or hangs as told; those of other stores go on. Catalogs are spared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: FileStore) -> None:
        self.error = 0
        """What every transfer fails with; 0 for none."""
        self.write_error = 0
        """The same, of writes alone."""
        self.bad_offsets: set[int] = set()
        """Where reads fail all the same."""
        self.may_be_cancelled = False
        self._presence, self._patience_s = store.presence, store.presence.deadline_s
        self._answers = threading.Event()
        self._answers.set()
        self._folder = str(store._state_dir.path) + "/"
        self._end_s = time.monotonic() + 60
        if isinstance(store.io, NativeIO):
            monkeypatch.setattr(store.io.device, "fault", self._ask_ring)
        for name in ("preadv", "pwritev", "fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._faulty(name, getattr(os, name)))

    def hang(self) -> None:
        """Nothing that begins from now on ends before `answer`. That is noticed soon, and only from now on: a disk that
        is slow because the machine is busy does not hang."""
        self._presence.deadline_s = min(HANG_S, self._patience_s)
        self._answers.clear()

    def answer(self) -> None:
        """Let go of what hangs."""
        self._presence.deadline_s = self._patience_s
        self._answers.set()

    def _ask_ring(self, is_write: bool, offset: int, num_bytes: int) -> int | None:
        if not self._answers.is_set() and time.monotonic() < self._end_s:
            from mii_hcache._io import HOLD, STUCK

            return HOLD if self.may_be_cancelled else STUCK
        return self._verdict(is_write, offset)

    def _verdict(self, is_write: bool, offset: int) -> int | None:
        error = errno.EIO if not is_write and offset in self.bad_offsets else self.error
        error = self.write_error if is_write and self.write_error else error
        return -error if error else None

    def _faulty(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(fd: int, *arguments: Any) -> Any:
            if os.readlink(f"/proc/self/fd/{fd}").startswith(self._folder):
                self._answers.wait(60)
                verdict = self._verdict(name != "preadv", arguments[-1] if arguments else -1)
                if verdict is not None:
                    raise OSError(-verdict, os.strerror(-verdict))
            return call(fd, *arguments)

        return asked
