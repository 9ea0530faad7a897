"""Pinned host memory: what a GPU copies from and to at full speed, and behind the caller's back.

Slabs of huge pages, first touched by several threads near the GPU, registered once, and cut into pieces; a slab goes
back to the system when its last piece is gone. Where memory cannot be registered it is plain: copies are as right, only
slower, and hold up whoever launches them. Never run on a GPU; tested with a registrar that only keeps books.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import weakref
from bisect import insort
from collections import deque

import torch

from mii_hcache.runtime.machine import num_usable_cpus
from mii_hcache.runtime.registrar import DriverRegistrar, Registrar

_log = logging.getLogger(__name__)

SLAB_BYTES = 64 << 20
"""Of a slab for small pieces. A larger piece has one of its own."""
_HUGE_BYTES = 2 << 20
_PAGE_BYTES = 4096
_MAX_TOUCHERS = 8
_TOUCH_BYTES = 16 << 20
"""Below this a second thread touches no pages."""
TO_PIN_MORE = (
    "raise the limit on locked memory (`ulimit -l unlimited`; for a container --ulimit memlock=-1 and a memory limit "
    "with room for it), or take a smaller --dram-capacity"
)
"""What to do where memory cannot be pinned."""


class _Slab:
    """A mapping of its own, and what of it is free: `[start, stop)`, in order, no two of them adjacent."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = -(-num_bytes // _HUGE_BYTES) * _HUGE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = mmap.mmap(-1, self.num_bytes + _HUGE_BYTES, flags=flags)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.offset = -address % _HUGE_BYTES
        """Where the slab starts in its mapping, so that huge pages fit."""
        self.address = address + self.offset
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.is_pinned = False
        self.free = [(0, self.num_bytes)]

    def touch(self, cpus: frozenset[int]) -> None:
        """Have all pages made, by threads on `cpus` (empty: on any): memory lies where it is touched first."""
        num_threads = max(1, min(_MAX_TOUCHERS, num_usable_cpus() // 2, self.num_bytes // _TOUCH_BYTES))
        share = -(-self.num_bytes // num_threads // _HUGE_BYTES) * _HUGE_BYTES

        def touch(start: int) -> None:
            if cpus:
                os.sched_setaffinity(0, cpus)  # of this thread alone
            ctypes.memset(self.address + start, 0, min(share, self.num_bytes - start))  # without the GIL

        threads = [threading.Thread(target=touch, args=(start,)) for start in range(0, self.num_bytes, share)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def cut(self, num_bytes: int) -> int | None:
        """Where a piece starts; None when it does not fit."""
        for idx, (start, stop) in enumerate(self.free):
            if stop - start >= num_bytes:
                self.free[idx : idx + 1] = [(start + num_bytes, stop)] if stop - start > num_bytes else []
                return start
        return None

    def mend(self, start: int, num_bytes: int) -> None:
        """A piece is free again."""
        insort(self.free, (start, start + num_bytes))
        merged = [self.free[0]]
        for begin, stop in self.free[1:]:
            if begin == merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((begin, stop))
        self.free = merged

    @property
    def is_unused(self) -> bool:
        return self.free == [(0, self.num_bytes)]


class PinnedMemory:
    """Gives out pieces of registered slabs. Any thread."""

    def __init__(self, registrar: Registrar, *, slab_bytes: int = SLAB_BYTES) -> None:
        self._registrar = registrar
        self._pid = os.getpid()
        self._slab_bytes = slab_bytes
        self._lock = threading.Lock()
        self._slabs: list[_Slab] = []
        self._returned: deque[tuple[_Slab, int, int]] = deque()
        """Pieces that are gone, by whatever thread dropped them last, in the middle of whatever it does."""
        self.why_not_pinned: str | None = None
        """Why some slab is plain memory; None when none ever was."""

    @property
    def num_near_cpus(self) -> int:
        """CPUs by which memory is touched because they are near the device; 0 where that is not known."""
        return len(self._registrar.near_cpus)

    @property
    def pinned_bytes(self) -> int:
        """Registered now, in use or not."""
        with self._lock:
            return sum(slab.num_bytes for slab in self._slabs if slab.is_pinned)

    @property
    def plain_bytes(self) -> int:
        """Taken, but not registered."""
        with self._lock:
            return sum(slab.num_bytes for slab in self._slabs if not slab.is_pinned)

    def is_pinned(self, address: int) -> bool:
        """Whether that lies in a slab that is registered."""
        with self._lock:
            return any(slab.is_pinned and 0 <= address - slab.address < slab.num_bytes for slab in self._slabs)

    def empty(self, num_bytes: int, *, slab_bytes: int = 0) -> torch.Tensor:
        """`[num_bytes]`, uint8, page-aligned, holding anything. Comes back when the last tensor and the last view of it
        are gone. A new slab takes a few milliseconds, more for a large piece. Raises OSError where there is no memory.
        `slab_bytes`: of a new slab, where that is more than usual.
        """
        wanted = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
        if not wanted:
            return torch.empty(0, dtype=torch.uint8)
        slab, start = self._take(wanted) or self._grow(wanted, slab_bytes)
        piece = (ctypes.c_ubyte * num_bytes).from_buffer(slab.memory, slab.offset + start)
        weakref.finalize(piece, self._give_back, slab, start, wanted).atexit = False
        return torch.frombuffer(piece, dtype=torch.uint8)

    def _take(self, num_bytes: int) -> tuple[_Slab, int] | None:
        self._settle()
        with self._lock:
            for slab in self._slabs:
                start = slab.cut(num_bytes)
                if start is not None:
                    return slab, start
        return None

    def _grow(self, num_bytes: int, slab_bytes: int) -> tuple[_Slab, int]:
        slab = _Slab(max(num_bytes, slab_bytes, self._slab_bytes))
        slab.touch(self._registrar.near_cpus)
        try:
            self._registrar.register(slab.address, slab.num_bytes)
            slab.is_pinned = True
        except OSError as error:
            is_first = self.why_not_pinned is None
            self.why_not_pinned = str(error)
            if is_first:
                _log.warning(
                    "%d MiB of host memory could not be pinned (%s): copies from and to the GPU are slow and hold up "
                    "the engine. To mend it, %s",
                    *(slab.num_bytes >> 20, self.why_not_pinned, TO_PIN_MORE),
                )
        if slab.is_pinned and hasattr(mmap, "MADV_DONTFORK"):
            slab.memory.madvise(mmap.MADV_DONTFORK)  # a fork would leave us copies of pages that the GPU does not know
        start = slab.cut(num_bytes)
        assert start is not None
        with self._lock:
            self._slabs.append(slab)
        return slab, start

    def _give_back(self, slab: _Slab, start: int, num_bytes: int) -> None:
        """A piece is gone. May interrupt any code of any thread, this class's too: so it never waits for the lock."""
        if os.getpid() == self._pid:  # a fork does not even see the memory
            self._returned.append((slab, start, num_bytes))
            self._settle()

    def _settle(self) -> None:
        """Take pieces back; whoever holds the lock meanwhile does it for others."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    slab, start, num_bytes = self._returned.popleft()
                    slab.mend(start, num_bytes)
                unused = [slab for slab in self._slabs if slab.is_unused]
                self._slabs = [slab for slab in self._slabs if not slab.is_unused]
            finally:
                self._lock.release()
            for slab in unused:
                self._let_go(slab)

    def _let_go(self, slab: _Slab) -> None:
        if slab.is_pinned:
            try:
                self._registrar.unregister(slab.address)
            except OSError as error:
                _log.error("%d MiB of pinned memory could not be given back: %s", slab.num_bytes >> 20, error)
                _LOST.append(slab)


_LOST: list[_Slab] = []
"""Memory that a device may still know must not be unmapped."""
_shared: list[PinnedMemory | None] = []
_shared_lock = threading.Lock()


def pinned_memory() -> PinnedMemory | None:
    """The process's; None where there is no GPU to copy from."""
    if not _shared:
        with _shared_lock:
            if not _shared:
                _shared.append(_open())
    return _shared[0]


def gauges() -> dict[str, float]:
    """Of the process, for its metrics; zeros where nothing was taken."""
    memory = _shared[0] if _shared else None
    return {
        "host_pinned_bytes": 0.0 if memory is None else memory.pinned_bytes,
        "host_not_pinned_bytes": 0.0 if memory is None else memory.plain_bytes,
    }


def _open() -> PinnedMemory | None:
    if not torch.cuda.is_available():
        return None
    try:
        return PinnedMemory(DriverRegistrar(torch.cuda.current_device()))
    except OSError as error:
        _log.warning("host memory cannot be pinned (%s): copies from and to the GPU are slow", error)
        return None
