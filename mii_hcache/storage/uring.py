"""Slots through the native engine: io_uring, around the page cache where memory and file system allow."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from mii_hcache.storage.arena import Arena, ArenaPool
from mii_hcache.storage.copying import copy_bytes
from mii_hcache.storage.disk_io import Arriving, DiskFile, DiskIO, PartWrite, SlotRead, SlotWrite
from mii_hcache.storage.format import BLOCK_BYTES, padded_bytes
from mii_hcache.storage.native import new_device

if TYPE_CHECKING:
    from mii_hcache import _io

_log = logging.getLogger(__name__)

QUEUE_DEPTH = 64
"""Requests in flight: 32 MiB of chunks of 512 KiB, more than any SSD wants at a time."""
SMALL_BYTES = 64 << 10
"""Slots up to this size are copied through aligned memory and go in one request; larger ones go in place."""

_Request: TypeAlias = "tuple[bool, _io.File, int, memoryview]"


class NativeFile(DiskFile):
    """A file, or what stands for one, that a native device knows, too."""

    def __init__(self, fd: int, native: _io.File) -> None:
        super().__init__(fd)
        self.native = native

    def close(self) -> None:
        self.native.close()
        super().close()


class NativeIO(DiskIO):
    """One native device and its thread. The caller waits, or does other things while its reads arrive.

    A large payload moves between the device and the caller's own memory when that is aligned to 4 KiB and a multiple of
    it long; the odd rest, headers and small slots pass through a few aligned, registered buffers of our own. What is
    not aligned goes through the page cache, which costs a copy and nothing else.
    """

    num_threads = 2
    """The disk needs none of them: they verify, at some 10 GB/s each."""

    def __init__(self, device: _io.Device) -> None:
        """`device` is taken over."""
        self.device = device
        self.arenas = ArenaPool(self.device.lend)
        self._told = threading.Event()

    def read(self, reads: Sequence[SlotRead]) -> Arriving:
        return _Reads(self, reads)

    def write(self, writes: Sequence[SlotWrite]) -> None:
        arena = Arena(self.arenas)
        requests: list[_Request] = []
        for write in writes:
            _add_write(requests, arena, write)
        self._carry_out(requests, arena)

    def write_parts(self, parts: Sequence[PartWrite]) -> None:
        arena = Arena(self.arenas)
        requests: list[_Request] = []
        for file, offset, data in parts:
            if data.readonly:
                block = arena.take(padded_bytes(len(data)))[: len(data)]
                block[:] = data
                data = block
            requests.append((True, _native(file), offset, data))
        self._carry_out(requests, arena)

    def _carry_out(self, requests: list[_Request], arena: Arena) -> None:
        """Write, wait, and give the arena back. Raises OSError."""
        batch = self.device.submit(requests)
        try:
            results = self._wait_all(batch)
        finally:
            batch.close()
            self.arenas.give_back(arena)
        self._tell_unless_direct(*{request[1] for request in requests})
        for (_, _, _, buffer), result in zip(requests, results, strict=True):
            if result != len(buffer):
                raise _error(result if result < 0 else -errno.EIO)

    def lend(self, buffer: memoryview) -> None:
        self.device.lend(buffer)  # refused where too little memory may be locked: then it costs what it did before

    def take_back(self, buffer: memoryview) -> None:
        self.device.take_back(buffer)

    def cancel(self) -> None:
        self.device.cancel()

    def close(self) -> None:
        self.device.close()

    def _tell_unless_direct(self, *files: _io.File) -> None:
        """Some file systems say so when a file is opened, others at the first transfer."""
        if not self._told.is_set() and not all(file.is_direct for file in files):
            self._told.set()
            _log.info("this file system has no direct I/O: reads and writes go through the page cache")

    def _wait_all(self, batch: _io.Batch) -> list[int]:
        return batch.wait_all()


class UringIO(NativeIO):
    """A ring."""

    name = "uring"

    def __init__(self, queue_depth: int = QUEUE_DEPTH) -> None:
        """Raises OSError where there is no io_uring: ask `native.why_no_uring` first."""
        super().__init__(new_device(queue_depth))

    def open(self, fd: int) -> DiskFile:
        native = self.device.open(fd)
        self._tell_unless_direct(native)
        return NativeFile(fd, native)


class _Reads(Arriving):
    def __init__(self, io: NativeIO, reads: Sequence[SlotRead]) -> None:
        self._reads = reads
        self._arenas = io.arenas
        self._arena = Arena(io.arenas)
        self._requests: list[_Request] = []
        self._firsts = [0]
        for read in reads:
            _add_read(self._requests, self._arena, read)
            self._firsts.append(len(self._requests))
        self._batch: _io.Batch | None = io.device.submit(self._requests)

    def finish(self, idx: int) -> memoryview | None:
        assert self._batch is not None, "waited for a read of a closed batch"
        first, stop = self._firsts[idx], self._firsts[idx + 1]
        for request_idx in reversed(range(first, stop)):  # what comes last first: then the others need no waiting
            result = self._batch.wait(request_idx)
            if result < 0:
                raise _error(result)
            if result != len(self._requests[request_idx][3]):
                return None
        out = self._reads[idx].out
        head = self._requests[first][3]
        if stop - first == 1:
            copy_bytes(out, head[BLOCK_BYTES : BLOCK_BYTES + len(out)])
        elif stop - first == 3:
            rest = len(out) % BLOCK_BYTES
            out[-rest:] = self._requests[stop - 1][3][:rest]
        return head[:BLOCK_BYTES]

    def close(self) -> None:
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.close()
            self._arenas.give_back(self._arena)


def _add_read(requests: list[_Request], arena: Arena, read: SlotRead) -> None:
    """One request for a small slot, else header, whole blocks in place, and the odd rest."""
    file = _native(read.file)
    num_bytes = len(read.out)
    slot_bytes = BLOCK_BYTES + padded_bytes(num_bytes)
    if slot_bytes <= SMALL_BYTES:
        requests.append((False, file, read.offset, arena.take(slot_bytes)))
        return
    num_whole = num_bytes // BLOCK_BYTES * BLOCK_BYTES
    requests.append((False, file, read.offset, arena.take(BLOCK_BYTES)))
    requests.append((False, file, read.offset + BLOCK_BYTES, read.out[:num_whole]))
    if num_whole < num_bytes:
        requests.append((False, file, read.offset + BLOCK_BYTES + num_whole, arena.take(BLOCK_BYTES)))


def _add_write(requests: list[_Request], arena: Arena, write: SlotWrite) -> None:
    """As `_add_read`."""
    file = _native(write.file)
    num_bytes = len(write.payload)
    slot_bytes = BLOCK_BYTES + padded_bytes(num_bytes)
    if slot_bytes <= SMALL_BYTES:
        slot = arena.take(slot_bytes)
        slot[:BLOCK_BYTES] = write.header
        slot[BLOCK_BYTES : BLOCK_BYTES + num_bytes] = write.payload
        slot[BLOCK_BYTES + num_bytes :] = bytes(slot_bytes - BLOCK_BYTES - num_bytes)
        requests.append((True, file, write.offset, slot))
        return
    num_whole = num_bytes // BLOCK_BYTES * BLOCK_BYTES
    header = arena.take(BLOCK_BYTES)
    header[:] = write.header
    requests.append((True, file, write.offset, header))
    requests.append((True, file, write.offset + BLOCK_BYTES, write.payload[:num_whole]))
    if num_whole < num_bytes:
        rest = arena.take(BLOCK_BYTES)
        rest[:] = bytes(write.payload[num_whole:]).ljust(BLOCK_BYTES, b"\0")
        requests.append((True, file, write.offset + BLOCK_BYTES + num_whole, rest))


def _native(file: DiskFile) -> _io.File:
    assert isinstance(file, NativeFile), "a file of another backend"
    return file.native


def _error(result: int) -> OSError:
    return OSError(-result, os.strerror(-result))
