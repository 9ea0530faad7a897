"""Copies of large buffers that let other threads run."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mii_hcache.storage.native import new_copier, why_not_built

if TYPE_CHECKING:
    from mii_hcache import _io

_SMALL_BYTES = 32 << 10
"""Below this a plain slice copy is faster than asking for addresses."""


def copy_bytes(out: memoryview, source: memoryview) -> None:
    """Copy `source` over `out`: byte views of equal length. Releases the GIL for large writable buffers, so that a
    copy of megabytes does not hold up the engine's thread; a read-only source is copied under the GIL."""
    if len(out) != len(source):
        raise ValueError(f"cannot copy {len(source)} bytes over {len(out)}")
    if len(out) < _SMALL_BYTES or source.readonly:
        out[:] = source
        return
    array = ctypes.c_char * len(out)
    ctypes.memmove(array.from_buffer(out), array.from_buffer(source), len(out))


def num_copying_threads() -> int:
    """By how many threads a large copy is made: half of the cores, at least 2 and at most 8. Memory is at its limit
    with a few, and the others belong to the engine."""
    return min(8, max(2, len(os.sched_getaffinity(0)) // 2))


class Copying:
    """Copies of whole batches: by the native engine where it was built, with several threads and without the GIL, else
    one after another by `copy_bytes`. Any thread, also several at once; its own threads start with the first large
    batch."""

    def __init__(self, num_threads: int) -> None:
        """`num_threads` work on one batch, its caller among them."""
        self.num_threads = num_threads
        self._lock = threading.Lock()
        self._copier: _io.Copier | None = None
        self._is_known = False

    @property
    def is_native(self) -> bool:
        """Whether large copies go through the native engine."""
        return self._native() is not None

    def copy(self, pairs: Iterable[tuple[memoryview, memoryview]]) -> None:
        """Copy each `(out, source)`: byte views of equal length that do not overlap. Returns when all is copied. Raises
        ValueError when lengths differ; then any part may have been copied."""
        large: list[tuple[Any, Any]] = []
        for out, source in pairs:
            if len(out) < _SMALL_BYTES:
                copy_bytes(out, source)
            else:
                large.append((out, source))
        if not large:
            return
        copier = self._native()
        if copier is not None:
            copier.run(large)
            return
        for out, source in large:
            copy_bytes(out, source)

    def _native(self) -> _io.Copier | None:
        if not self._is_known:
            with self._lock:
                if not self._is_known:
                    self._copier = new_copier(self.num_threads) if why_not_built() is None else None
                    self._is_known = True
        return self._copier


_shared: list[Copying] = []
"""The last one is this process's; those before it are a parent's, whose threads a fork did not bring along: they can
be neither used nor ended here."""


def shared_copying() -> Copying:
    """The one that all stores of this process copy with: however many there are, memory is one."""
    if not _shared:
        _renew()
    return _shared[-1]


def _renew() -> None:
    _shared.append(Copying(num_copying_threads()))


os.register_at_fork(after_in_child=_renew)
