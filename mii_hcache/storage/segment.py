"""One segment file: slots at fixed offsets."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from pathlib import Path

from mii_hcache.storage.disk_io import DiskFile, DiskIO, ThreadsIO, write_all
from mii_hcache.storage.format import BLOCK_BYTES, SegmentHeader
from mii_hcache.storage.segment_space import Segment
from mii_hcache.storage.state_dir import open_private, sync_dir

UNFINISHED_SUFFIX = ".new"
"""Of segment files that are not yet what their name will say."""

_GROWTH_BYTES = 8 << 20
"""By how much a file's size runs ahead of its slots. A write that moves the end of a file waits for all others and, on
a ring, goes to a thread of the kernel's: several times the CPU time of one into a hole."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class SegmentFile(Segment):
    """A segment in a file of its own, which the first write makes."""

    def __init__(self, path: Path, header: SegmentHeader, io: DiskIO, file: DiskFile | None = None) -> None:
        """`file`: None for a segment that does not exist yet."""
        super().__init__(str(path), header, io)
        self.path = path
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
        assert self._file is not None, "the file is not there yet"
        num_bytes = os.fstat(self._file.fd).st_size - BLOCK_BYTES
        return min(self.header.num_slots, -(-num_bytes // self.header.slot_bytes)) if num_bytes > 0 else 0

    @property
    def file(self) -> DiskFile | None:
        return self._file

    def ready(self, slot: int) -> DiskFile:
        file = self._make()
        self._grow(file, self._offset(slot + 1))
        return file

    def address(self, slot: int) -> tuple[str, int] | None:
        return str(self.path.absolute()), self._offset(slot)

    def sync(self) -> None:
        if self._file is not None:
            os.fdatasync(self._file.fd)

    def punch(self, slot: int) -> bool:
        if self._file is None:
            return True
        fd = self._file.fd
        offset, length = ctypes.c_longlong(self._offset(slot)), ctypes.c_longlong(self.header.slot_bytes)
        while _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length) != 0:
            number = ctypes.get_errno()
            if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                return False
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number), str(self.path))
        return True

    def unlink(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

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
