"""Blocks on disk: what is packed parses back, what was touched does not."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.layout import SpanLayout
from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.format import (
    BLOCK_BYTES,
    SegmentHeader,
    SlotHeader,
    pack_kinds,
    padded_bytes,
    parse_kinds,
    slot_bytes,
    slot_counts,
    slot_sizes,
)

slot_headers = st.builds(
    SlotHeader,
    store_uuid=st.binary(min_size=16, max_size=16),
    span_id=st.binary(min_size=32, max_size=32),
    layer_idx=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(ChunkKind),
    generation=st.integers(0, 2**64 - 1),
    num_bytes=st.integers(0, 2**64 - 1),
    crc=st.integers(0, 2**32 - 1),
)
segment_headers = st.builds(
    SegmentHeader,
    store_uuid=st.binary(min_size=16, max_size=16),
    slot_bytes=st.integers(2, 2**40).map(lambda blocks: blocks * BLOCK_BYTES),
    num_slots=st.integers(1, 2**40),
)
SLOT = SlotHeader(
    store_uuid=b"u" * 16,
    span_id=b"s" * 32,
    layer_idx=3,
    kind=ChunkKind.KV,
    generation=5,
    num_bytes=7,
    crc=11,
)
SEGMENT = SegmentHeader(store_uuid=b"u" * 16, slot_bytes=12_288, num_slots=9)


@given(header=slot_headers)
def test_slot_headers_round_trip(header):
    assert len(header.pack()) == BLOCK_BYTES
    assert SlotHeader.parse(header.pack()) == header


@given(header=segment_headers)
def test_segment_headers_round_trip(header):
    assert len(header.pack()) == BLOCK_BYTES
    assert SegmentHeader.parse(header.pack()) == header


def test_version_2_never_changes():
    """Files of released versions are out there: a new layout needs a new version."""
    assert SLOT.pack()[:96] == struct.pack(
        "<8sI16s32sIB3xQQI", b"HCACHESL", 2, b"u" * 16, b"s" * 32, 3, 2, 5, 7, 11
    ).ljust(96, b"\0")
    assert SEGMENT.pack()[:64] == struct.pack("<8sI16sQQ", b"HCACHESG", 2, b"u" * 16, 12_288, 9).ljust(64, b"\0")
    for block in (SLOT.pack(), SEGMENT.pack()):
        assert block[-4:] == struct.pack("<I", crc32c(block[:-4]))


@pytest.mark.parametrize("header", [SLOT, SEGMENT])
@given(bit=st.integers(0, 8 * BLOCK_BYTES - 1))
def test_any_flipped_bit_is_found(header, bit):
    block = bytearray(header.pack())
    block[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptChunkError):
        type(header).parse(block)


@pytest.mark.parametrize("header", [SLOT, SEGMENT])
@given(block=st.binary(max_size=BLOCK_BYTES).flatmap(lambda b: st.sampled_from([b, b.ljust(BLOCK_BYTES, b"\0")])))
def test_garbage_is_not_a_header(header, block):
    with pytest.raises(CorruptChunkError):
        type(header).parse(block)


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("header", [SLOT, SEGMENT])
def test_another_version_is_refused(header, version):
    block = bytearray(header.pack())
    block[8:12] = struct.pack("<I", version)
    block[-4:] = struct.pack("<I", crc32c(block[:-4]))
    with pytest.raises(CorruptChunkError, match=f"format version {version}, this is 2"):
        type(header).parse(block)


@given(kinds=st.lists(st.sampled_from([None, *ChunkKind]), max_size=200).map(tuple))
def test_kinds_round_trip_in_a_byte_a_layer(kinds):
    assert len(pack_kinds(kinds)) == len(kinds)
    assert parse_kinds(pack_kinds(kinds)) == (kinds, 1)


@given(kinds=st.lists(st.sampled_from([None, *ChunkKind]), max_size=50).map(tuple), kv_shards=st.integers(1, 64))
def test_kinds_of_shards_round_trip_too(kinds, kv_shards):
    assert parse_kinds(pack_kinds(kinds, kv_shards)) == (kinds, kv_shards if ChunkKind.KV in kinds else 1)


def test_codes_of_kinds_never_change():
    assert pack_kinds((None, ChunkKind.HIDDEN, ChunkKind.KV)) == b"\0\1\2"
    assert pack_kinds((ChunkKind.HIDDEN, ChunkKind.KV), 2) == b"\1\6"
    for code in (3, 4, 5, 255):  # no kind, nothing in shards, hidden rows in shards, more shards than there can be
        with pytest.raises(CorruptChunkError, match=f"unknown kind {code}"):
            parse_kinds(bytes([0, code]))
    with pytest.raises(CorruptChunkError, match=r"\[1, 2\] shards in one span"):
        parse_kinds(b"\2\6")


def test_a_shard_is_told_from_all_others():
    shards = [dataclasses.replace(SLOT, shard=shard, num_shards=2) for shard in range(2)]
    assert len({SLOT.pack(), *(header.pack() for header in shards)}) == 3
    assert [SlotHeader.parse(header.pack()) for header in shards] == shards
    assert shards[1].pack()[64:66] == b"\6\1"
    with pytest.raises(CorruptChunkError, match="shard 2 of 2"):
        SlotHeader.parse(dataclasses.replace(SLOT, shard=2, num_shards=2).pack())


def test_each_chunk_has_a_slot_of_its_size():
    mixed = SpanLayout.shared((ChunkKind.HIDDEN, None, ChunkKind.KV, ChunkKind.HIDDEN), 4096, 4097)
    assert slot_sizes(mixed) == (8192, 12_288, 8192)
    assert slot_counts(mixed) == {8192: 2, 12_288: 1}
    alike = SpanLayout.shared((ChunkKind.HIDDEN, ChunkKind.KV), 4000, 4096)
    assert slot_counts(alike) == {8192: 2}, "other lengths, one size of slot"


def test_one_kind_of_header_is_not_the_other():
    with pytest.raises(CorruptChunkError, match="magic"):
        SlotHeader.parse(SEGMENT.pack())
    with pytest.raises(CorruptChunkError, match="magic"):
        SegmentHeader.parse(SLOT.pack())


@pytest.mark.parametrize("sizes", [{"slot_bytes": 4096}, {"slot_bytes": 9000}, {"num_slots": 0}])
def test_impossible_segments_are_refused(sizes):
    with pytest.raises(CorruptChunkError, match="impossible"):
        SegmentHeader.parse(dataclasses.replace(SEGMENT, **sizes).pack())


@given(num_bytes=st.integers(1, 2**40))
def test_slots_hold_header_and_payload_in_whole_blocks(num_bytes):
    assert 0 <= padded_bytes(num_bytes) - num_bytes < BLOCK_BYTES
    assert slot_bytes(num_bytes) == BLOCK_BYTES + padded_bytes(num_bytes)
    assert slot_bytes(num_bytes) % BLOCK_BYTES == 0
