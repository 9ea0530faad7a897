"""How payloads get from segment files into device memory without a detour over the host's: the seam.

Device memory is an address and a length here; nothing looks at it but the GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from mii_hcache.storage.disk_io import DiskFile


class PayloadRead(NamedTuple):
    """A payload to read into device memory."""

    file: DiskFile
    """Of the backend that this goes with."""
    offset: int
    """Of the payload in the file."""
    address: int
    num_bytes: int


class ArrivingOnDevice(ABC):
    """A batch of such reads. After `close` no memory is written to any more."""

    @abstractmethod
    def finish(self, idx: int) -> bool:
        """Wait until read `idx` has arrived, unverified. False when the file ended before. Any thread. Raises
        OSError."""

    @abstractmethod
    def close(self) -> None:
        """Nobody waits any more. Blocks until what is in flight has ended. Idempotent."""

    def __enter__(self) -> ArrivingOnDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DeviceIO(ABC):
    """Reads into one GPU's memory. Methods may be called from any thread; what the GPU refuses is an OSError."""

    align_bytes: int
    """What address and length of a read must be multiples of."""

    @abstractmethod
    def read(self, reads: Sequence[PayloadRead]) -> ArrivingOnDevice:
        """Begin to read. The memory is the reads' until the outcome is closed."""

    @abstractmethod
    def crc32c(self, pieces: Sequence[tuple[int, int]]) -> list[int]:
        """CRC32Cs of device memory, (address, number of bytes) each, computed there. Sees all reads that have been
        finished. Blocks."""

    @abstractmethod
    def copy_in(self, address: int, buffer: memoryview) -> None:
        """Host to device. Blocks; the bytes are there when it returns."""

    @abstractmethod
    def lend(self, address: int, num_bytes: int) -> bool:
        """Tell of device memory that many reads will go to. False when it cannot be registered: reads work all the
        same, through cuFile's own memory."""

    @abstractmethod
    def take_back(self, address: int, num_bytes: int) -> None:
        """Undo `lend`, before the memory is freed; no read into it is running. What was not lent is ignored."""

    @abstractmethod
    def close(self) -> None:
        """Release the GPU. No other call is running. Idempotent."""
