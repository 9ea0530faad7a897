"""What csrc/python offers. There only where the package was built with a compiler; see storage/native.py."""

from __future__ import annotations

from collections.abc import Callable

from typing_extensions import Buffer

ABI: int
HOLD: int
"""What a `Fault` says of an attempt that is to wait and be asked about again."""
STUCK: int
"""The same, for one that no cancellation ends."""

Fault = Callable[[bool, int, int], int | None]
"""(is_write, offset, num_bytes) of an attempt, on the device's thread: None lets it pass, else a negative errno, how
many bytes to move, HOLD or STUCK."""

def why_no_uring() -> str | None: ...

class File:
    @property
    def is_direct(self) -> bool: ...
    def close(self) -> None: ...

class Batch:
    def __len__(self) -> int: ...
    def wait(self, idx: int) -> int: ...
    def wait_all(self) -> list[int]: ...
    def close(self) -> None: ...

class Device:
    fault: Fault | None
    def __init__(self, depth: int) -> None: ...
    def open(self, fd: int) -> File: ...
    def submit(self, requests: list[tuple[bool, File, int, memoryview]]) -> Batch: ...
    def lend(self, buffer: Buffer) -> bool: ...
    def take_back(self, buffer: Buffer) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...

class Slab(Buffer):
    def __init__(self, num_bytes: int) -> None: ...

class Copier:
    def __init__(self, num_threads: int, bytes_per_thread: int = ...) -> None:
        """At most `num_threads` work on a call, the caller among them, and no more than one for each
        `bytes_per_thread`."""

    def run(self, pairs: list[tuple[Buffer, Buffer]]) -> None:
        """Copy `(target, source)` of equal length, C-contiguous. Any thread; blocks without the GIL."""

    def scatter(self, rows: list[tuple[int, int, int, int, int, int]]) -> None:
        """Copy `(target, target_stride, source, source_stride, num_bytes, num_runs)`: addresses and bytes; run `i` of
        `num_bytes` goes from `source + i * source_stride` to `target + i * target_stride`. Nothing is checked: the
        caller vouches for the addresses, that no target overlaps anything else, and that the memory lives until the
        return; it is not touched later. Any thread; blocks without the GIL."""
