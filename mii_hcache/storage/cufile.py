"""GPUDirect Storage: payloads from SSDs into device memory by cuFile. Everything else goes as it does without.

Tested on fakes of NVIDIA's libraries; never run on a GPU.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mii_hcache.storage.cufile_proof import prove
from mii_hcache.storage.device_io import ArrivingOnDevice, DeviceIO, PayloadRead
from mii_hcache.storage.disk_io import Arriving, DiskFile, DiskIO, PartWrite, SlotRead, SlotWrite
from mii_hcache.storage.format import BLOCK_BYTES
from mii_hcache.storage.native import new_cufile

if TYPE_CHECKING:
    from mii_hcache import _io

_log = logging.getLogger(__name__)

QUEUE_DEPTH = 64
NUM_THREADS = 8
"""Blocking calls at a time: 4 MiB of chunks of 512 KiB in flight, which keeps an SSD busy."""


class CufileFile(DiskFile):
    """A file of the backend beneath, which cuFile is told of when it is first read into device memory."""

    def __init__(self, beneath: DiskFile) -> None:
        super().__init__(beneath.fd)
        self.beneath = beneath
        self._lock = threading.Lock()
        self._natives: dict[_io.Cufile, _io.CufileFile] = {}

    def native_of(self, cufile: _io.Cufile) -> _io.CufileFile:
        """The file as `cufile` knows it."""
        with self._lock:
            native = self._natives.get(cufile)
            if native is None:
                native = self._natives[cufile] = cufile.open(self.fd)
            return native

    def close(self) -> None:
        with self._lock:
            natives, self._natives = list(self._natives.values()), {}
        for native in natives:
            native.close()
        self.beneath.close()
        self.fd = self.beneath.fd


class CufileIO(DiskIO):
    """A backend for host memory, and for each GPU that is asked for a `CufileReads`."""

    name = "cufile"

    def __init__(self, beneath: DiskIO) -> None:
        """`beneath` is taken over."""
        self.beneath = beneath
        self.num_threads = beneath.num_threads

    def open(self, fd: int) -> DiskFile:
        return CufileFile(self.beneath.open(fd))

    def read(self, reads: Sequence[SlotRead]) -> Arriving:
        return self.beneath.read([read._replace(file=_cufile(read.file).beneath) for read in reads])

    def write(self, writes: Sequence[SlotWrite]) -> None:
        self.beneath.write([write._replace(file=_cufile(write.file).beneath) for write in writes])

    def write_parts(self, parts: Sequence[PartWrite]) -> None:
        self.beneath.write_parts([part._replace(file=_cufile(part.file).beneath) for part in parts])

    def cancel(self) -> None:
        self.beneath.cancel()

    def lend(self, buffer: memoryview) -> None:
        self.beneath.lend(buffer)

    def take_back(self, buffer: memoryview) -> None:
        self.beneath.take_back(buffer)

    def open_device(self, gpu_idx: int, scratch: Path) -> DeviceIO | None:
        try:
            reads = open_proven(gpu_idx, scratch)
        except OSError as error:
            _log.warning("nothing is read straight into GPU %d: %s", gpu_idx, error)
            return None
        _log.info("chunks are read straight into GPU %d (%s)", gpu_idx, reads.gpu_name)
        return reads

    def close(self) -> None:
        self.beneath.close()


class CufileReads(DeviceIO):
    """One GPU's queue of reads, and its checksum kernel."""

    align_bytes = BLOCK_BYTES

    def __init__(self, gpu_idx: int) -> None:
        """Makes the GPU's primary context, which is the one that frameworks use. Raises OSError."""
        self.cufile = new_cufile(gpu_idx, QUEUE_DEPTH, NUM_THREADS)
        self.gpu_name = self.cufile.gpu_name

    def read(self, reads: Sequence[PayloadRead]) -> ArrivingOnDevice:
        return _Arriving(self.cufile, reads)

    def crc32c(self, pieces: Sequence[tuple[int, int]]) -> list[int]:
        return self.cufile.crc32c(list(pieces))

    def copy_in(self, address: int, buffer: memoryview) -> None:
        self.cufile.copy_in(address, buffer)

    def lend(self, address: int, num_bytes: int) -> bool:
        return self.cufile.lend(address, num_bytes)

    def take_back(self, address: int, num_bytes: int) -> None:
        self.cufile.take_back(address, num_bytes)

    def close(self) -> None:
        self.cufile.close()


def open_proven(gpu_idx: int, scratch: Path) -> CufileReads:
    """Reads into a GPU's memory that were seen to bring the right bytes from files in the directory `scratch`. Only
    where `native.why_no_cufile` is None. Raises OSError saying what is wrong. Blocks."""
    reads = CufileReads(gpu_idx)
    why_not = prove(reads.cufile, scratch)
    if why_not is not None:
        reads.close()
        raise OSError(why_not)
    return reads


class _Arriving(ArrivingOnDevice):
    def __init__(self, cufile: _io.Cufile, reads: Sequence[PayloadRead]) -> None:
        self._lengths = [read.num_bytes for read in reads]
        self._batch = cufile.submit(
            [(False, _cufile(read.file).native_of(cufile), read.offset, read.address, read.num_bytes) for read in reads]
        )

    def finish(self, idx: int) -> bool:
        result = self._batch.wait(idx)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result == self._lengths[idx]

    def close(self) -> None:
        self._batch.close()


def _cufile(file: DiskFile) -> CufileFile:
    assert isinstance(file, CufileFile), "a file of another backend"
    return file
