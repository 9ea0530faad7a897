"""Chunks into device memory, on fakes of NVIDIA's libraries: whose "device memory" kills a CPU that touches it."""

from __future__ import annotations

import errno
import random
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.storage.device_reads import WINDOW_CHUNKS
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.records import ChunkRead, DeviceRead, ReadOutcome, SpanRecord
from mii_hcache.storage.state_dir import StateDir
from tests.storage.gpu.conftest import ROOM_BYTES
from tests.storage.storage_kit import holds, make_chunks, make_record, put


def to_device(record: SpanRecord, address: int, step: int | None = None) -> list[DeviceRead]:
    """Chunks one after another, or every `step` bytes."""
    reads = []
    for chunk in record.layout.chunks:
        reads.append(
            DeviceRead(
                span_id=record.span_id,
                layer_idx=chunk.layer_idx,
                address=address,
                num_bytes=chunk.num_bytes,
                kind=chunk.kind,
            )
        )
        address += step or chunk.num_bytes
    return reads


def on_device(gpu, read: DeviceRead) -> bytearray:
    out = bytearray(read.num_bytes)
    gpu.copy_out(out, read.address)
    return out


def counts(store: FileStore) -> tuple[int, int]:
    reader = store.device_reader(0)
    return reader.num_direct, reader.num_bounced


def segment_of(store: FileStore) -> Path:
    (path,) = store._state_dir.segments.glob("*.seg")
    return path


@pytest.mark.parametrize(
    ("chunk_bytes", "place", "is_direct"),
    [(131_072, 0, True), (4096, 8192, True), (131_072, 16, False), (5000, 0, False), (70_001, 4096, False)],
)
def test_chunks_arrive_verified(store, gpu, room, chunk_bytes, place, is_direct):
    record = make_record("a", chunk_bytes=chunk_bytes, num_chunks=5)
    assert put(store, record) and holds(store, record)
    reads = to_device(record, room + place)
    assert store.device_reader(0).get_into(reads) == ReadOutcome(num_ok=5)
    assert [on_device(gpu, read) for read in reads] == make_chunks(record)
    assert counts(store) == ((5, 0) if is_direct else (0, 5))
    assert store.stats().read_bytes == 2 * record.num_bytes


def test_batches_longer_than_the_queue_and_of_both_ways(store, gpu, room, fakes):
    """Several windows, the last one shorter, every third chunk taking the detour."""
    num_chunks = 2 * WINDOW_CHUNKS + 7
    record = make_record("long", chunk_bytes=8192, num_chunks=num_chunks)
    assert put(store, record)
    reads = [
        DeviceRead(
            span_id=read.span_id, layer_idx=read.layer_idx, address=read.address + 8 * (idx % 3 == 0), num_bytes=8192
        )
        for idx, read in enumerate(to_device(record, room, step=12_288))
    ]
    fakes.cufile["most_bytes"] = 5000  # and no transfer is whole
    assert store.device_reader(0).get_into(reads) == ReadOutcome(num_ok=num_chunks)
    assert [on_device(gpu, read) for read in reads] == make_chunks(record)
    assert counts(store) == (num_chunks - (num_chunks + 2) // 3, (num_chunks + 2) // 3)


@pytest.mark.parametrize("seed", range(8))
def test_any_batch_reads_as_it_does_into_host_memory(store, gpu, room, seed):
    """Any spans, sizes, order and places: the same outcome, the same bytes, and not a byte anywhere else."""
    rng = random.Random(seed)
    sizes = [1, 900, 4096, 5000, 8192, 65_536]
    records = [
        make_record(name, chunk_bytes=rng.choice(sizes), num_chunks=rng.randint(1, 6))
        for name in range(rng.randint(1, 9))
    ]
    for record in records:
        assert put(store, record)
    if rng.random() < 0.5:
        store.delete([rng.choice(records).span_id])
    wanted = [(record, chunk_idx) for record in records for chunk_idx in range(record.layout.num_chunks)]
    rng.shuffle(wanted)
    reads, mirror = [], bytearray(rng.randbytes(4 << 20))
    gpu.copy_in(room, mirror)
    place = 0
    for record, chunk_idx in wanted:
        place += rng.choice([0, 0, 1, 4096, 5000])
        if rng.random() < 0.7:
            place = -(-place // 4096) * 4096
        reads.append(replace(to_device(record, 0)[chunk_idx], address=room + place))
        place += reads[-1].num_bytes
    outcome = store.device_reader(0).get_into(reads)
    on_host = [
        ChunkRead(span_id=read.span_id, layer_idx=read.layer_idx, out=memoryview(bytearray(read.num_bytes)))
        for read in reads
    ]
    assert outcome == store.get_into(on_host)
    for idx, (read, (record, chunk_idx)) in enumerate(zip(reads, wanted, strict=True)):
        start = read.address - room
        piece = slice(start, start + read.num_bytes)
        mirror[piece] = make_chunks(record)[chunk_idx] if idx < outcome.num_ok else on_device(gpu, read)
    arrived = bytearray(len(mirror))
    gpu.copy_out(arrived, room)
    assert arrived == mirror


def test_what_cannot_be_read_is_missing(store, gpu, room):
    record, other = make_record("a", chunk_bytes=8192), make_record("b", chunk_bytes=8192)
    put(store, record)
    reader = store.device_reader(0)
    good = to_device(record, room)
    there = to_device(other, room + (1 << 20))
    assert reader.get_into([*good[:2], *there]) == ReadOutcome(num_ok=2, reason="missing")
    with pytest.raises(ValueError, match="over one another"):
        reader.get_into([*good, replace(good[0], address=good[2].address + 8191)])
    assert reader.get_into([]) == ReadOutcome(num_ok=0)
    for wrong in (
        DeviceRead(span_id=record.span_id, layer_idx=1, address=room, num_bytes=4096),
        DeviceRead(span_id=record.span_id, layer_idx=1, address=room, num_bytes=8192, kind=ChunkKind.KV),
        DeviceRead(span_id=record.span_id, layer_idx=99, address=room, num_bytes=8192),
    ):
        assert reader.get_into([wrong]) == ReadOutcome(num_ok=0, reason="missing")
    assert holds(store, record) and store.stats().corrupt_chunks == 0


@pytest.mark.parametrize("victim", [0, 3, WINDOW_CHUNKS + 1])
def test_a_byte_that_cufile_brings_wrong_is_corrupt(store, gpu, room, fakes, victim):
    """The disk is right and the host would see nothing: only the GPU can tell."""
    record = make_record("a", chunk_bytes=8192, num_chunks=WINDOW_CHUNKS + 5)
    put(store, record)
    reader = store.device_reader(0)  # its own trial comes before the fault
    span = store._index._spans[record.span_id]
    _, offset = store._segments.where(span.places[victim])
    fakes.cufile["flip_at"] = offset + 5555
    assert reader.get_into(to_device(record, room)) == ReadOutcome(num_ok=victim, reason="corrupt")
    assert store.find(record.span_id) is None and store.why_missing(record.span_id) == "corrupt"
    assert store.stats().corrupt_chunks == 1
    fakes.cufile["flip_at"] = -1
    assert put(store, record)
    assert reader.get_into(to_device(record, room)).reason is None


@pytest.mark.parametrize("chunk_bytes", [8192, 5000], ids=["direct", "detour"])
@pytest.mark.parametrize("damage", ["payload", "header", "cut"])
def test_damage_on_disk(store, gpu, room, damage, chunk_bytes):
    record = make_record("a", chunk_bytes=chunk_bytes)
    put(store, record)
    reads = to_device(record, room)
    assert store.device_reader(0).get_into(reads).reason is None  # what stays in memory must not hide the damage
    _, offset = store._segments.where(store._index._spans[record.span_id].places[1])
    with open(segment_of(store), "r+b") as file:
        if damage == "cut":
            file.truncate(offset + 100)
        else:
            file.seek(offset + 77 if damage == "payload" else offset - 4000)
            file.write(b"?")
    assert store.device_reader(0).get_into(reads) == ReadOutcome(num_ok=1, reason="corrupt")
    assert store.find(record.span_id) is None


def test_a_slot_that_was_used_again_is_missing(store, gpu, room):
    record, other = make_record("a", chunk_bytes=8192), make_record("b", chunk_bytes=8192)
    put(store, record)
    put(store, other)
    spans = store._index._spans
    spans[record.span_id].places = spans[other.span_id].places  # as a row of an older catalog would say
    assert store.device_reader(0).get_into(to_device(record, room)) == ReadOutcome(num_ok=0, reason="missing")
    assert store.find(record.span_id) is None and store.find(other.span_id) is not None


@pytest.mark.parametrize("result", [(-1, errno.EIO), (-5044, 0), (-5036, 0)])
def test_where_cufile_fails_the_chunk_takes_the_detour(store, gpu, room, fakes, result, caplog):
    """An error of the short way says nothing about the chunk."""
    record = make_record("a", chunk_bytes=8192)
    put(store, record)
    reader = store.device_reader(0)
    fakes.fail(1, *result)
    reads = to_device(record, room)
    assert reader.get_into(reads) == ReadOutcome(num_ok=3)
    assert [on_device(gpu, read) for read in reads] == make_chunks(record)
    assert counts(store) == (2, 1)
    assert "cuFile failed" in caplog.text
    fakes.fail(-1, *result)
    assert reader.get_into(reads) == ReadOutcome(num_ok=3)
    assert counts(store) == (2, 4)


@pytest.mark.parametrize(("fault", "num_ok"), [("launch_error", 1), ("copy_error", 0)])
def test_a_gpu_that_fails_harms_no_span(store, gpu, room, fakes, fault, num_ok):
    """The first chunk takes the detour, the others only the GPU can verify."""
    record = make_record("a", chunk_bytes=8192)
    put(store, record)
    reader = store.device_reader(0)
    reads = to_device(record, room)
    reads[0] = replace(reads[0], address=room + (1 << 20) + 1)
    fakes.cuda[fault] = 719
    assert reader.get_into(reads) == ReadOutcome(num_ok=num_ok, reason="unavailable")
    assert holds(store, record) and store.stats().corrupt_chunks == 0
    fakes.cuda[fault] = 0
    assert reader.get_into(reads) == ReadOutcome(num_ok=3)


def test_several_threads(store, gpu, room, fakes):
    records = [make_record(name, chunk_bytes=65_536) for name in range(8)]
    for record in records:
        put(store, record)
    fakes.cufile["delay_us"] = 300
    reader = store.device_reader(0)
    wrong: list[object] = []

    def read(idx: int) -> None:
        rng = random.Random(idx)
        for _ in range(10):
            record = rng.choice(records)
            reads = to_device(record, room + idx * (1 << 20))
            if reader.get_into(reads) != ReadOutcome(num_ok=3):
                wrong.append("outcome")
            if [on_device(gpu, one) for one in reads] != make_chunks(record):
                wrong.append(record)

    threads = [threading.Thread(target=read, args=(idx,)) for idx in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fakes.cufile["most_at_once"] > 1


def test_lent_memory(store, gpu, room, fakes):
    record = make_record("a", chunk_bytes=8192)
    put(store, record)
    reader = store.device_reader(0)
    assert reader.lend(room, ROOM_BYTES)
    assert fakes.cufile["buffers"] == 1
    reads = to_device(record, room + 4096)
    assert reader.get_into(reads) == ReadOutcome(num_ok=3)
    assert [on_device(gpu, read) for read in reads] == make_chunks(record)
    reader.take_back(room, ROOM_BYTES)
    assert fakes.cufile["buffers"] == 0
    reader.take_back(room, ROOM_BYTES)
    fakes.cufile["buffer_error"] = 5036
    assert not reader.lend(room, ROOM_BYTES)
    assert reader.get_into(reads) == ReadOutcome(num_ok=3)


def test_the_end_of_a_store_and_of_its_reader(fakes, gpu, room, tmp_path):
    record = make_record("a", chunk_bytes=8192)
    with closing(StateDir(tmp_path)) as state_dir:
        store = FileStore(state_dir, 1 << 26, io="cufile")
        put(store, record)
        reader = store.device_reader(0)
        assert store.device_reader(0) is reader
        assert reader.lend(room, 8192)
        assert reader.get_into(to_device(record, room)).reason is None
        assert fakes.cufile["handles"] >= 1
        store.close()
        assert fakes.cufile["handles"] == fakes.cufile["buffers"] == 0
        assert reader.get_into(to_device(record, room)) == ReadOutcome(num_ok=0, reason="missing")
        assert not reader.lend(room, 8192)
        reader.take_back(room, 8192)
        assert store.device_reader(0) is None and store.device_reader(1) is None
        store.close()


def test_segments_may_go_while_the_reader_lives(fakes, gpu, room, tmp_path):
    """Their descriptors must not be closed under cuFile (the fake ends the program then)."""
    with (
        closing(StateDir(tmp_path)) as state_dir,
        closing(FileStore(state_dir, 1 << 26, io="cufile", segment_bytes=1 << 16)) as store,
    ):
        for name in range(6):
            record = make_record(name, chunk_bytes=8192)
            assert put(store, record)
            assert store.device_reader(0).get_into(to_device(record, room)).reason is None
            assert fakes.cufile["handles"] >= 1
            store.delete([record.span_id])
            store.flush()
            store.flush()
        assert fakes.cufile["handles"] <= 2
