"""Where segments lie: what a store needs of it, whether it is a directory of files or a raw NVMe namespace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.disk_io import DiskIO, SlotRead, SlotWrite
from mii_hcache.storage.format import SegmentHeader, SlotHeader


class StaleSlotError(CorruptChunkError):
    """A slot holds a sound chunk, but another one than asked for: the slot was reused."""


class Segment(ABC):
    """Slots at fixed offsets behind a header. Methods may be called from any thread and block on I/O; each raises
    OSError as it comes.

    A new segment comes into being with the first write. Slots are read and written by a `DiskIO`, in batches over
    several segments; this says where, and checks what arrived. The owner sees to it that no slot is written and read at
    once, and that nothing is in progress when it calls `unlink` or `close`.
    """

    def __init__(self, name: str, header: SegmentHeader, io: DiskIO) -> None:
        """`name`: for people."""
        self.name = name
        self.header = header
        self._io = io

    @property
    @abstractmethod
    def num_written(self) -> int:
        """Leading slots that may take up room. Of an existing segment."""

    @abstractmethod
    def to_write(self, slot: int, header: SlotHeader, payload: memoryview) -> SlotWrite:
        """The write of a slot, for the segment that this makes and grows if it must."""

    @abstractmethod
    def to_read(self, slot: int, out: memoryview) -> SlotRead | None:
        """The read of a slot; None when there is no segment yet."""

    @abstractmethod
    def sync(self) -> None:
        """Make what was written durable."""

    @abstractmethod
    def punch(self, slot: int) -> bool:
        """Give a slot's bytes back; it reads as zeros. False when that cannot be had here."""

    @abstractmethod
    def unlink(self) -> None:
        """Delete the segment."""

    @abstractmethod
    def close(self) -> None:
        """Use it no more. Idempotent."""

    def check(self, slot: int, header: SlotHeader, found: bytes | memoryview | None) -> None:
        """Check that a slot carries exactly `header`; `found` is what was read, None at the segment's end. The
        payload's CRC is the caller's to check. Raises StaleSlotError or CorruptChunkError."""
        if found is None:
            raise CorruptChunkError(f"{self.name}: slot {slot} ends early")
        if found != header.pack():
            generation = SlotHeader.parse(found).generation
            raise StaleSlotError(f"{self.name}: slot {slot} holds generation {generation}")

    def read_into(self, slot: int, header: SlotHeader, out: memoryview) -> None:
        """Read one slot's payload and `check`. Raises StaleSlotError, CorruptChunkError."""
        read = self.to_read(slot, out)
        with self._io.read([] if read is None else [read]) as arriving:
            self.check(slot, header, None if read is None else arriving.finish(0))


class SegmentSpace(ABC):
    """The place of one store's segments, by number. One caller at a time."""

    segment_bytes: int | None = None
    """Size that segments must have; None leaves it to the store."""
    numbers: Sequence[int] | None = None
    """Numbers that segments may have, used again and again, known after `find`; None: every segment has a new one."""
    last_number: int = 0
    """Highest number that was in use when `find` looked, by whomever."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        """Sentences for people about what `find` left alone."""

    @abstractmethod
    def find(self, store_uuid: bytes) -> dict[int, Segment]:
        """The store's segments that are there. Blocks on I/O. What is not the store's is left alone. Raises ConfigError
        when the whole place belongs to another store."""

    @abstractmethod
    def new(self, number: int, header: SegmentHeader) -> Segment:
        """A segment that the first write makes. Does not block."""
