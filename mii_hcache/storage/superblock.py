"""The first block of a raw NVMe namespace that holds a store's segments. `format.py` says what a segment is.

    namespace   =  superblock (1 block)  +  zeros  +  num_regions regions, region i at first_region + i * region_bytes
    region      =  a segment (segment header, slots), or a block of zeros: then it is free
    superblock  :  8s magic "HCACHENS" | I version | 16s store uuid | 16s set uuid | I ordinal | Q region_bytes
                   | Q num_regions | Q first_region | zeros | I crc

Integers are little-endian, a block is 4096 bytes, `crc` is as in other blocks. Segment NUMBER is region NUMBER - 1.
The set uuid and the ordinal are zeros, kept for a store over several namespaces. Numbers are used again: a row of the
catalog that outlives its region meets another generation there, and a slot of another generation is a miss.

Order of writing:

    format        zeros over the superblock → flush → zeros over every region's first block → flush → superblock → flush
    new segment   segment header → slots → flush → rows in the catalog
    remove        rows deleted, commit → zeros over the segment header

A superblock that is torn, or of another store, is refused: nothing is written to that namespace.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.format import BLOCK_BYTES, UUID_BYTES, check_seal, seal

_MAGIC = b"HCACHENS"
_VERSION = 1
_FIELDS = struct.Struct("<8sI16s16sIQQQ")
_KNOWN = (
    (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
    (0, b"XFSB", "an XFS file system"),
    (1080, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (512, b"EFI PART", "a partition table (GPT)"),
    (512, b"LABELONE", "an LVM volume"),
    (510, b"\x55\xaa", "a partition table or a boot sector"),
    (4086, b"SWAPSPACE2", "swap space"),
)
"""(offset, bytes there, what that is)"""


@dataclass(frozen=True, kw_only=True)
class Superblock:
    """How a namespace is divided, and whose it is."""

    store_uuid: bytes
    region_bytes: int
    num_regions: int
    first_region: int
    """Offset of region 0."""
    set_uuid: bytes = bytes(UUID_BYTES)
    ordinal: int = 0

    def pack(self) -> bytes:
        """The block."""
        return seal(
            _FIELDS.pack(
                _MAGIC,
                _VERSION,
                self.store_uuid,
                self.set_uuid,
                self.ordinal,
                self.region_bytes,
                self.num_regions,
                self.first_region,
            )
        )

    @staticmethod
    def parse(block: bytes | bytearray | memoryview) -> Superblock:
        """Inverse of `pack`. Raises CorruptChunkError for anything but a sound superblock of this version."""
        check_seal(block, _MAGIC, "superblock", version=_VERSION)
        _, _, store_uuid, set_uuid, ordinal, region_bytes, num_regions, first_region = _FIELDS.unpack_from(block)
        if region_bytes < 3 * BLOCK_BYTES or num_regions < 1 or first_region < BLOCK_BYTES:
            raise CorruptChunkError(f"superblock: impossible sizes {region_bytes} x {num_regions} at {first_region}")
        if region_bytes % BLOCK_BYTES or first_region % BLOCK_BYTES:
            raise CorruptChunkError("superblock: regions begin within blocks")
        return Superblock(
            store_uuid=store_uuid,
            set_uuid=set_uuid,
            ordinal=ordinal,
            region_bytes=region_bytes,
            num_regions=num_regions,
            first_region=first_region,
        )

    def start_of(self, number: int) -> int:
        """Offset of segment `number`, which is at least 1."""
        return self.first_region + (number - 1) * self.region_bytes

    @property
    def num_bytes(self) -> int:
        """Where the last region ends."""
        return self.start_of(self.num_regions + 1)


def describe_block(block: bytes | memoryview) -> str | None:
    """What a namespace whose first block is this seems to hold, for people; None when it is blank."""
    content = bytes(block)
    if not any(content):
        return None
    if content.startswith(_MAGIC):
        try:
            return f"saved state of the store {Superblock.parse(content).store_uuid.hex()}"
        except CorruptChunkError as error:
            return f"saved state of ours, damaged ({error})"
    for offset, magic, what in _KNOWN:
        if content[offset : offset + len(magic)] == magic:
            return what
    return "data of unknown kind"
