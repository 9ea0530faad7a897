"""How slots get between memory and segment files: the seam, and the backend that needs nothing but Python."""

from __future__ import annotations

import errno
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from mii_hcache.storage.format import BLOCK_BYTES, padded_bytes

if TYPE_CHECKING:
    from mii_hcache.storage.device_io import DeviceIO

_ZEROS = memoryview(bytes(BLOCK_BYTES))
_per_thread = threading.local()


class DiskFile:
    """An open file; owns its descriptor. Not to be closed while it is read or written."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class SlotRead(NamedTuple):
    """A slot to read."""

    file: DiskFile
    offset: int
    out: memoryview
    """For the payload: writable, format `B`, as long as it."""


class SlotWrite(NamedTuple):
    """A slot to write."""

    file: DiskFile
    offset: int
    header: bytes
    """One block."""
    payload: memoryview
    """Format `B`."""


class PartWrite(NamedTuple):
    """A part of a slot to write."""

    file: DiskFile
    offset: int
    data: memoryview
    """Format `B`. What is read-only is small and lies anywhere."""


class Arriving(ABC):
    """A batch of reads. After `close` no buffer is written to any more."""

    @abstractmethod
    def finish(self, idx: int) -> bytes | memoryview | None:
        """Wait until read `idx` has arrived; the slot's header, valid until this thread calls again. None when the file
        ended before the slot did. Any thread, each read once. Raises OSError."""

    @abstractmethod
    def close(self) -> None:
        """Nobody waits any more. Blocks until what is in flight has ended. Idempotent."""

    def __enter__(self) -> Arriving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DiskIO(ABC):
    """Reads and writes slots. Methods may be called from any thread."""

    name: str
    """What `--io` calls it."""
    num_threads: int
    """By how many threads a batch of reads is best waited for."""

    @abstractmethod
    def open(self, fd: int) -> DiskFile:
        """Take a descriptor over."""

    @abstractmethod
    def read(self, reads: Sequence[SlotRead]) -> Arriving:
        """Begin to read slots. Buffers are the reads' until the outcome is closed."""

    @abstractmethod
    def write(self, writes: Sequence[SlotWrite]) -> None:
        """Write slots whole: header, payload, padding. Blocks. Raises OSError as the first failed write; then any part
        of any slot may have been written."""

    def write_parts(self, parts: Sequence[PartWrite]) -> None:
        """Write parts of slots; as `write`. Unless a backend has a better way, through the page cache."""
        for file, offset, data in parts:
            write_all(file.fd, [data], offset)

    def lend(self, buffer: memoryview) -> None:  # noqa: B027, a hint may be ignored
        """As `ChunkStore.lend`."""

    def take_back(self, buffer: memoryview) -> None:  # noqa: B027, a hint may be ignored
        """As `ChunkStore.take_back`."""

    def cancel(self) -> None:  # noqa: B027, threads in system calls cannot be called back
        """End what is in flight early, if that is possible: for a disk that hangs. Does not block."""

    def open_device(self, gpu_idx: int, scratch: Path) -> DeviceIO | None:
        """Reads into a GPU's memory, proven in the directory `scratch`; None where that cannot be had, the reason being
        logged. The caller closes it before this. Blocks."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Release threads and memory, after all files were closed. Idempotent."""


class ThreadsIO(DiskIO):
    """`preadv` and `pwritev` through the page cache, on the threads that ask. Works everywhere."""

    name = "threads"
    num_threads = 4

    def open(self, fd: int) -> DiskFile:
        return DiskFile(fd)

    def read(self, reads: Sequence[SlotRead]) -> Arriving:
        return _Blocking(reads)

    def write(self, writes: Sequence[SlotWrite]) -> None:
        for file, offset, header, payload in writes:
            padding = _ZEROS[: padded_bytes(len(payload)) - len(payload)]
            write_all(file.fd, [memoryview(header), payload, padding], offset)

    def close(self) -> None:
        """Nothing to release."""


class _Blocking(Arriving):
    """Reads that happen when they are waited for."""

    def __init__(self, reads: Sequence[SlotRead]) -> None:
        self._reads = reads

    def finish(self, idx: int) -> memoryview | None:
        file, offset, out = self._reads[idx]
        header = _header_block()
        return header if read_all(file.fd, [header, out], offset) else None

    def close(self) -> None:
        """Whoever waits does the work: there is nothing in flight when nobody does."""


def _header_block() -> memoryview:
    """This thread's block for reading headers."""
    block: memoryview | None = getattr(_per_thread, "block", None)
    if block is None:
        block = _per_thread.block = memoryview(bytearray(BLOCK_BYTES))
    return block


def write_all(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write byte views one after another. Raises OSError."""
    rest = list(buffers)
    while rest:
        num_bytes = os.pwritev(fd, rest, offset)
        if num_bytes <= 0:
            raise OSError(errno.EIO, "a write made no progress")
        offset += num_bytes
        rest = _after(rest, num_bytes)


def read_all(fd: int, buffers: Sequence[memoryview], offset: int) -> bool:
    """Fill byte views one after another. False at the end of the file. Raises OSError."""
    rest = list(buffers)
    while rest:
        num_bytes = os.preadv(fd, rest, offset)
        if num_bytes == 0:
            return False
        offset += num_bytes
        rest = _after(rest, num_bytes)
    return True


def _after(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of `buffers` after their first `num_bytes`."""
    for idx, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[idx + 1 :]]
        num_bytes -= len(buffer)
    return []
