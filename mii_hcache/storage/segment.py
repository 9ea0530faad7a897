"""One segment file: slots at fixed offsets."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.disk_io import DiskFile, DiskIO, PartWrite, SlotRead, SlotWrite, ThreadsIO, write_all
from mii_hcache.storage.format import BLOCK_BYTES, SegmentHeader, SlotHeader, padded_bytes
from mii_hcache.storage.state_dir import open_private, sync_dir

UNFINISHED_SUFFIX = ".new"
"""Of segment files that are not yet what their name will say."""

_GROWTH_BYTES = 8 << 20
"""By how much a file's size runs ahead of its slots. A write that moves the end of a file waits for all others and, on
a ring, goes to a thread of the kernel's: several times the CPU time of one into a hole."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class StaleSlotError(CorruptChunkError):
    """A slot holds a sound chunk, but another one than asked for: the slot was reused."""


class SegmentFile:
    """A segment on disk. Methods may be called from any thread and block on I/O; each raises OSError as it comes.

    A new segment's file is made by the first write. Slots are read and written by a `DiskIO`, in batches over several
    segments; this says where, and checks what arrived. The owner sees to it that no slot is written and read at once,
    and that nothing is in progress when it calls `unlink` or `close`.
    """

    def __init__(self, path: Path, header: SegmentHeader, io: DiskIO, file: DiskFile | None = None) -> None:
        """`file`: None for a segment that does not exist yet."""
        self.path = path
        self.header = header
        self._io = io
        self._file = file
        self._making = threading.Lock()
        self._size_bytes = 0 if file is None else os.fstat(file.fd).st_size

    @staticmethod
    def open(path: Path, io: DiskIO) -> SegmentFile:
        """Open an existing file. Raises CorruptChunkError when its header is not one of this format."""
        fd = open_private(path, os.O_RDWR)
        try:
            header = SegmentHeader.parse(os.pread(fd, BLOCK_BYTES, 0))
            return SegmentFile(path, header, io, io.open(fd))
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def open_to_read(path: Path) -> SegmentFile:
        """Open an existing file and never write it. Raises CorruptChunkError when its header is not one of this
        format, OSError."""
        fd = open_private(path, os.O_RDONLY)
        try:
            io = ThreadsIO()
            return SegmentFile(path, SegmentHeader.parse(os.pread(fd, BLOCK_BYTES, 0)), io, io.open(fd))
        except BaseException:
            os.close(fd)
            raise

    @property
    def num_written(self) -> int:
        """Slots that begin before the file's end."""
        assert self._file is not None, "the file is not there yet"
        num_bytes = os.fstat(self._file.fd).st_size - BLOCK_BYTES
        return min(self.header.num_slots, -(-num_bytes // self.header.slot_bytes)) if num_bytes > 0 else 0

    def to_write(self, slot: int, header: SlotHeader, payload: memoryview) -> SlotWrite:
        """The write of a slot, for the file that this makes and grows if it must."""
        return SlotWrite(self._ready(slot), self._offset(slot), header.pack(), payload)

    def to_write_ends(self, slot: int, header: SlotHeader) -> Iterator[PartWrite]:
        """The writes of a slot's header and of what pads its payload."""
        file, offset = self._ready(slot), self._offset(slot)
        yield PartWrite(file, offset, memoryview(header.pack()))
        padding = bytes(padded_bytes(header.num_bytes) - header.num_bytes)
        if padding:
            yield PartWrite(file, offset + BLOCK_BYTES + header.num_bytes, memoryview(padding))

    def to_write_part(self, slot: int, start: int, data: memoryview) -> PartWrite:
        """The write of a payload's bytes from `start` on."""
        return PartWrite(self._ready(slot), self._offset(slot) + BLOCK_BYTES + start, data)

    def to_read(self, slot: int, out: memoryview) -> SlotRead | None:
        """The read of a slot; None when there is no file."""
        return None if self._file is None else SlotRead(self._file, self._offset(slot), out)

    def where(self, slot: int) -> tuple[DiskFile, int] | None:
        """The file, and where in it the slot's payload begins; None when there is no file."""
        return None if self._file is None else (self._file, self._offset(slot) + BLOCK_BYTES)

    def check(self, slot: int, header: SlotHeader, found: bytes | memoryview | None) -> None:
        """Check that a slot carries exactly `header`; `found` is what was read, None at the file's end. The payload's
        CRC is the caller's to check. Raises StaleSlotError or CorruptChunkError."""
        if found is None:
            raise CorruptChunkError(f"{self.path}: slot {slot} ends early")
        if found != header.pack():
            generation = SlotHeader.parse(found).generation
            raise StaleSlotError(f"{self.path}: slot {slot} holds generation {generation}")

    def read_into(self, slot: int, header: SlotHeader, out: memoryview) -> None:
        """Read one slot's payload and `check`. Raises StaleSlotError, CorruptChunkError."""
        read = self.to_read(slot, out)
        with self._io.read([] if read is None else [read]) as arriving:
            self.check(slot, header, None if read is None else arriving.finish(0))

    def sync(self) -> None:
        """Make what was written durable."""
        if self._file is not None:
            os.fdatasync(self._file.fd)

    def punch(self, slot: int) -> bool:
        """Give a slot's bytes back to the disk; it reads as zeros. False when the file system cannot."""
        if self._file is None:
            return True
        fd = self._file.fd
        offset, length = ctypes.c_longlong(self._offset(slot)), ctypes.c_longlong(self.header.slot_bytes)
        while _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length) != 0:
            if ctypes.get_errno() != errno.EINTR:
                return False
        return True

    def unlink(self) -> None:
        """Delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _offset(self, slot: int) -> int:
        return BLOCK_BYTES + slot * self.header.slot_bytes

    def _ready(self, slot: int) -> DiskFile:
        """The file, made and grown for this slot if it must be."""
        file = self._make()
        self._grow(file, self._offset(slot + 1))
        return file

    def _grow(self, file: DiskFile, stop: int) -> None:
        """Move the file's end behind `stop`; no bytes of the disk are taken by that."""
        if stop <= self._size_bytes:
            return
        with self._making:
            if stop > self._size_bytes:
                wanted = min(-(-stop // _GROWTH_BYTES) * _GROWTH_BYTES, self._offset(self.header.num_slots))
                with contextlib.suppress(OSError):  # such as a limit on the size of files: then writes move the end
                    os.ftruncate(file.fd, wanted)
                self._size_bytes = wanted

    def _make(self) -> DiskFile:
        with self._making:
            if self._file is not None:
                return self._file
            if self.path.exists():
                raise FileExistsError(errno.EEXIST, "a segment file appeared", str(self.path))
            new = self.path.with_suffix(UNFINISHED_SUFFIX)  # a crash must not leave a file without a header
            fd = open_private(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            file, name = DiskFile(fd), new
            try:
                file = self._io.open(fd)
                write_all(fd, [memoryview(self.header.pack())], 0)
                os.fsync(fd)
                name = new.rename(self.path)
                sync_dir(self.path.parent)
            except BaseException:
                file.close()
                name.unlink(missing_ok=True)
                raise
            self._file = file
            return file
