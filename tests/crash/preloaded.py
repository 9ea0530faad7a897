"""Python's side of `preload.c`, in the process that runs with it: what is to go wrong, or to be recorded.

Slots that go through io_uring never pass the C library: the same rules are asked by the native engine's fault hook, and
its writes are recorded where they are submitted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import time
from functools import partial
from typing import Any, Protocol

from tests.crash.opened import OpenedStore, file_stores
from tests.crash.workload import Say

READ, WRITE, SYNC, META = 1, 2, 4, 8
FAIL, SHORT, DIE, SLEEP = 1, 2, 3, 4


class _Library(Protocol):
    crash_verdict: Any
    crash_note: Any


def rule(
    ops: int, part: str, action: int, arg: float, *, probability: float = 1.0, skip: int = 0, count: int = -1
) -> list[Any]:
    """A rule for calls of kinds `ops` on files whose name contains `part`: after `skip` of them, `count` (-1: all) meet
    `action` with `probability`. `arg`: an errno, the share of the bytes that is moved, or seconds."""
    return [ops, part, probability, skip, count, action, arg]


class Device:
    """The trouble of one process. `what`: `root` and `seed`; `rules`; `budget_bytes` (how much files may grow);
    `file_bytes` (RLIMIT_FSIZE); `ballast` (a file that takes room); `record` (path of a log: then no sync waits for the
    disk); `early`: trouble begins before the store is opened; `heals`: it ends before the store is closed."""

    def __init__(self, what: dict[str, Any]) -> None:
        self._what = what
        self._lib = lib = ctypes.CDLL(None)
        lib.crash_begin.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
        lib.crash_rule.argtypes = [
            *(ctypes.c_int, ctypes.c_char_p, ctypes.c_double, ctypes.c_long, ctypes.c_long, ctypes.c_int),
            ctypes.c_double,
        ]
        lib.crash_budget.argtypes = [ctypes.c_int64]
        lib.crash_record.argtypes = lib.crash_note.argtypes = [ctypes.c_char_p]
        lib.crash_verdict.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_double)]
        lib.crash_write_begins.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_char_p, ctypes.c_size_t]
        lib.crash_write_begins.restype = lib.crash_num_done.restype = ctypes.c_uint64
        lib.crash_write_ended.argtypes = [ctypes.c_uint64]

    def begin(self, say: Say) -> Say:
        """Before the store is opened. Returns how to say things from now on."""
        what, lib = self._what, self._lib
        lib.crash_begin(os.fsencode(what["root"]), what["seed"])
        if what.get("record"):
            lib.crash_record(os.fsencode(what["record"]))
            self._record_rings()
            return lambda line: lib.crash_note(line.encode())
        if what.get("early"):
            self._arm()
        return say

    def opened(self, opened: OpenedStore) -> None:
        """The store is open: trouble begins, unless it did before."""
        if not self._what.get("early"):
            self._arm()
        for file in file_stores(opened.store) if self._what.get("rules") else []:
            if hasattr(file.io, "device"):
                file.io.device.fault = partial(self._fault, {})

    def end(self, opened: OpenedStore) -> bool:
        """The work is done. Whether trouble is over from now on."""
        if not self._what.get("heals"):
            return False
        self._lib.crash_clear()
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if self._what.get("ballast"):
            os.unlink(self._what["ballast"])
        for file in file_stores(opened.store):
            file._room._full_until_s = 0.0  # as after a few seconds
            deadline_s = time.monotonic() + 60.0
            while not file.presence.is_here and time.monotonic() < deadline_s:
                time.sleep(0.01)
        return True

    @property
    def num_done(self) -> int:
        """How often a rule struck."""
        return int(self._lib.crash_num_done())

    def _arm(self) -> None:
        what = self._what
        for ops, part, *numbers in what.get("rules", ()):
            self._lib.crash_rule(ops, part.encode(), *numbers)
        if what.get("budget_bytes") is not None:
            self._lib.crash_budget(what["budget_bytes"])
        if what.get("file_bytes") is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (what["file_bytes"], resource.RLIM_INFINITY))

    def _fault(self, holds: dict[tuple[bool, int], float], is_write: bool, offset: int, num_bytes: int) -> int | None:
        """For the ring's slots, on the ring's thread: which file it is, it is not told."""
        from mii_hcache._io import HOLD

        key, now_s = (is_write, offset), time.monotonic()
        if key in holds:
            if now_s < holds[key]:
                return HOLD
            del holds[key]
            return None
        arg = ctypes.c_double()
        action = self._lib.crash_verdict(WRITE if is_write else READ, b"00000001.seg", ctypes.byref(arg))
        if action == FAIL:
            return -int(arg.value)
        if action == SHORT:
            return max(1, int(num_bytes * arg.value))
        if action == SLEEP:
            holds[key] = now_s + arg.value
            return HOLD
        if action == DIE:
            part = int(num_bytes * arg.value) // 512 * 512
            self._lib.crash_rule(WRITE, b"", 1.0, 0, -1, DIE, 0.0)  # the rest is never moved
            if not is_write or part == 0:
                os._exit(9)
            return part
        return None

    def _record_rings(self) -> None:
        """Tell the record of what a ring writes."""
        try:
            from mii_hcache.storage.uring import UringIO
        except ImportError:
            return
        write, lib = UringIO.write, self._lib

        def recorded(io: Any, writes: Any) -> None:
            ids = []
            for file, offset, header, payload in writes:
                data = bytes(header) + bytes(payload)
                data += bytes(-len(data) % 4096)
                ids.append(lib.crash_write_begins(file.fd, offset, data, len(data)))
            write(io, writes)
            for id_ in ids:
                lib.crash_write_ended(id_)

        UringIO.write = recorded  # type: ignore[method-assign]
