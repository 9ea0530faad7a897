"""Where segments lie: what a store needs of it, whether it is a directory of files or a raw NVMe namespace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.disk_io import DiskFile, DiskIO, PartWrite, SlotRead, SlotWrite
from mii_hcache.storage.format import BLOCK_BYTES, SegmentHeader, SlotHeader, padded_bytes


class StaleSlotError(CorruptChunkError):
    """A slot holds a sound chunk, but another one than asked for: the slot was reused."""


class Segment(ABC):
    """Slots at fixed offsets behind a header. Methods may be called from any thread and block on I/O; each raises
    OSError as it comes.

    A new segment comes into being with the first write. Slots are read and written by a `DiskIO`, in batches over
    several segments; this says where, and checks what arrived. The owner sees to it that no slot is written and read at
    once, and that nothing is in progress when it calls `unlink` or `close`.
    """

    def __init__(self, name: str, header: SegmentHeader, io: DiskIO, *, start: int = 0) -> None:
        """`name`: for people. `start`: byte of its file where the segment begins."""
        self.name = name
        self.header = header
        self._io = io
        self._start = start

    @property
    @abstractmethod
    def file(self) -> DiskFile | None:
        """Where it lies; None when there is no segment yet."""

    @property
    @abstractmethod
    def num_written(self) -> int:
        """Leading slots that may take up room. Of an existing segment."""

    @abstractmethod
    def ready(self, slot: int) -> DiskFile:
        """Where it lies, the segment being made and grown for this slot if it must be."""

    @abstractmethod
    def sync(self) -> None:
        """Make what was written durable."""

    @abstractmethod
    def punch(self, slot: int) -> bool:
        """Give a slot's bytes back; it reads as zeros. False when that cannot be had here. Raises OSError when it only
        failed this time."""

    @abstractmethod
    def unlink(self) -> None:
        """Delete the segment."""

    @abstractmethod
    def close(self) -> None:
        """Use it no more. Idempotent."""

    def to_write(self, slot: int, header: SlotHeader, payload: memoryview) -> SlotWrite:
        """The write of a slot, for the segment that this makes and grows if it must."""
        return SlotWrite(self.ready(slot), self._offset(slot), header.pack(), payload)

    def to_write_ends(self, slot: int, header: SlotHeader) -> Iterator[PartWrite]:
        """The writes of a slot's header and of what pads its payload."""
        file, offset = self.ready(slot), self._offset(slot)
        yield PartWrite(file, offset, memoryview(header.pack()))
        padding = bytes(padded_bytes(header.num_bytes) - header.num_bytes)
        if padding:
            yield PartWrite(file, offset + BLOCK_BYTES + header.num_bytes, memoryview(padding))

    def to_write_part(self, slot: int, start: int, data: memoryview) -> PartWrite:
        """The write of a payload's bytes from `start` on."""
        return PartWrite(self.ready(slot), self._offset(slot) + BLOCK_BYTES + start, data)

    def to_read(self, slot: int, out: memoryview) -> SlotRead | None:
        """The read of a slot; None when there is no segment yet."""
        file = self.file
        return None if file is None else SlotRead(file, self._offset(slot), out)

    def where(self, slot: int) -> tuple[DiskFile, int] | None:
        """Where the slot's payload begins; None when there is no segment yet."""
        file = self.file
        return None if file is None else (file, self._offset(slot) + BLOCK_BYTES)

    def address(self, slot: int) -> tuple[str, int] | None:
        """File that other processes can open, and where in it the slot starts; None when there is no such file."""
        return None

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

    def _offset(self, slot: int) -> int:
        return self._start + BLOCK_BYTES + slot * self.header.slot_bytes


class SegmentSpace(ABC):
    """The place of one store's segments, by number. One caller at a time."""

    segment_bytes: int | None = None
    """Size that segments must have; None leaves it to the store."""
    numbers: Sequence[int] | None = None
    """Numbers that segments may have, used again and again, known after `find`; None: every segment has a new one."""
    takes_parts: bool = True
    """Whether bytes can be written wherever they lie in a slot, not only whole blocks."""
    last_number: int = 0
    """Highest number that was in use when `find` looked, by whomever."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        """Sentences for people about what `find` left alone."""

    @abstractmethod
    def find(self, store_uuid: bytes) -> dict[int, Segment]:
        """The store's segments that are there. Blocks on I/O. What is not the store's is left alone. Raises ConfigError
        when the whole place belongs to another store."""

    def probe(self) -> None:  # noqa: B027, a directory is probed by its owner
        """See whether the place answers. Blocks on I/O. Raises OSError."""

    @abstractmethod
    def new(self, number: int, header: SegmentHeader) -> Segment:
        """A segment that the first write makes. Does not block."""
