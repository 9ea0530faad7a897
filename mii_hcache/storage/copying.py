"""Copies of large buffers that let other threads run."""

from __future__ import annotations

import ctypes

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
