"""Segments in the regions of a raw NVMe namespace. `superblock.py` says what lies there."""

from __future__ import annotations

import errno
import logging
import threading

from mii_hcache.errors import ConfigError, CorruptChunkError
from mii_hcache.storage.disk_io import DiskFile, DiskIO
from mii_hcache.storage.format import BLOCK_BYTES, SegmentHeader
from mii_hcache.storage.nvme import NvmeFile
from mii_hcache.storage.segment_space import Segment, SegmentSpace
from mii_hcache.storage.spdk import SpdkIO
from mii_hcache.storage.superblock import Superblock, describe_block

_log = logging.getLogger(__name__)

BATCH_BLOCKS = 256
"""Headers read or written at a time."""
_ZEROS = bytes(BLOCK_BYTES)


class Region(Segment):
    """A segment in a region. Bytes of deleted spans stay until their place is used again."""

    def __init__(self, number: int, start: int, header: SegmentHeader, io: DiskIO, namespace: NvmeFile) -> None:
        super().__init__(f"region {number} of {namespace.address}", header, io, start=start)
        self._namespace = namespace
        self._making = threading.Lock()
        self.is_there = False

    @property
    def num_written(self) -> int:
        return 0  # what no row names takes no room: nobody else would get it

    @property
    def file(self) -> DiskFile | None:
        return self._namespace if self.is_there else None

    def ready(self, slot: int) -> DiskFile:
        with self._making:
            if not self.is_there:
                self._namespace.write_blocks([(self._start, self.header.pack())])
                self.is_there = True
        return self._namespace

    def sync(self) -> None:
        if self.is_there:
            self._namespace.flush()

    def punch(self, slot: int) -> bool:
        return not self.is_there

    def unlink(self) -> None:
        if self.is_there:
            self._namespace.write_blocks([(self._start, _ZEROS)])

    def close(self) -> None:
        """Nothing to release: the namespace is the backend's."""


class Regions(SegmentSpace):
    """The regions of one namespace. Those that hold another store's segments are left alone; those whose header is
    damaged are free, because no row can name a segment without a header."""

    takes_parts = False

    def __init__(self, io: SpdkIO) -> None:
        """Reads the superblock. Raises ConfigError when there is none of ours."""
        super().__init__()
        self._io = io
        self._namespace = io.namespace
        self._superblock = read_superblock(io.namespace)
        self.segment_bytes = self._superblock.region_bytes

    def find(self, store_uuid: bytes) -> dict[int, Segment]:
        if self._superblock.store_uuid != store_uuid:
            raise ConfigError(
                f"{self._namespace.address} holds the segments of another store "
                f"({self._superblock.store_uuid.hex()}): choose its state directory, or format the namespace anew"
            )
        found: dict[int, Segment] = {}
        numbers = range(1, self._superblock.num_regions + 1)
        usable: list[int] = []
        for first in range(0, len(numbers), BATCH_BLOCKS):
            batch = numbers[first : first + BATCH_BLOCKS]
            starts = [(self._superblock.start_of(number), BLOCK_BYTES) for number in batch]
            try:
                blocks = self._namespace.read_blocks(starts)
            except OSError as error:
                raise ConfigError(f"{self._namespace.address} cannot be read ({error})") from error
            for number, block in zip(batch, blocks, strict=True):
                header = self._header_in(number, block)
                if header is not None and header.store_uuid != store_uuid:
                    self.notes.append(f"region {number} was left alone (it belongs to another store)")
                    _log.warning("%s", self.notes[-1])
                    continue
                usable.append(number)
                if header is not None:
                    region = self._region(number, header)
                    region.is_there = True
                    found[number] = region
        self.numbers = usable
        return found

    def probe(self) -> None:
        [block] = self._namespace.read_blocks([(0, BLOCK_BYTES)])
        if block != self._superblock.pack():
            raise OSError(errno.ENODEV, f"{self._namespace.address} is another namespace now")

    def new(self, number: int, header: SegmentHeader) -> Segment:
        return self._region(number, header)

    def _region(self, number: int, header: SegmentHeader) -> Region:
        return Region(number, self._superblock.start_of(number), header, self._io, self._namespace)

    def _header_in(self, number: int, block: memoryview) -> SegmentHeader | None:
        """None for a free region."""
        if block == _ZEROS:
            return None
        try:
            header = SegmentHeader.parse(block)
            if BLOCK_BYTES + header.num_slots * header.slot_bytes > self._superblock.region_bytes:
                raise CorruptChunkError("more slots than fit")
        except CorruptChunkError as error:
            self.notes.append(f"the header of region {number} is damaged ({error}); its spans are forgotten")
            _log.warning("%s", self.notes[-1])
            return None
        return header


def read_superblock(namespace: NvmeFile) -> Superblock:
    """Raises ConfigError when there is none of ours, or one that does not fit the namespace."""
    advice = "python -m mii_hcache.storage.pyspdk format makes it ours"
    try:
        [block] = namespace.read_blocks([(0, BLOCK_BYTES)])
        superblock = Superblock.parse(block)
    except OSError as error:
        raise ConfigError(f"{namespace.address} cannot be read ({error})") from error
    except CorruptChunkError:
        seen = describe_block(block) or "nothing"
        raise ConfigError(f"{namespace.address} is not formatted for us: it seems to hold {seen}; {advice}") from None
    if superblock.num_bytes > namespace.num_bytes:
        raise ConfigError(f"{namespace.address} is smaller than when it was formatted; {advice}")
    return superblock


def format_namespace(namespace: NvmeFile, store_uuid: bytes, region_bytes: int) -> Superblock:
    """Make a namespace ours, whatever it holds. A crash on the way leaves it blank. Raises ConfigError, OSError."""
    first_region = min(1 << 20, region_bytes)
    num_regions = (namespace.num_bytes - first_region) // region_bytes
    if num_regions < 1:
        raise ConfigError(f"{namespace.address} has {namespace.num_bytes} bytes: less than a region of {region_bytes}")
    superblock = Superblock(
        store_uuid=store_uuid, region_bytes=region_bytes, num_regions=num_regions, first_region=first_region
    )
    namespace.write_blocks([(0, _ZEROS)])
    namespace.flush()
    numbers = range(1, num_regions + 1)
    for first in range(0, num_regions, BATCH_BLOCKS):
        batch = numbers[first : first + BATCH_BLOCKS]
        namespace.write_blocks([(superblock.start_of(number), _ZEROS) for number in batch])
    namespace.flush()
    namespace.write_blocks([(0, superblock.pack())])
    namespace.flush()
    return superblock
