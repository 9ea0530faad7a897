"""Another process reads and writes a store's chunks, by directions: what its owner sees, and never a wrong byte."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
from crc32c import crc32c

from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.directions import ChunkWanted, ReadDirections
from mii_hcache.storage.open_io import open_io
from mii_hcache.storage.records import ReadOutcome, SpanRecord
from mii_hcache.storage.slot_files import SlotFiles
from tests.storage.storage_kit import IO, SPAN_DISK_BYTES, StoreKit, holds, make_chunks, make_record, put


def follow(link: Connection, io: str) -> None:
    """The other process."""
    files = SlotFiles(open_io(io)[0])
    while (asked := link.recv()) is not None:
        what, directions, chunks = asked
        if what == "read":
            outs = [memoryview(bytearray(slot.header.num_bytes)) for slot in directions]
            outcome = files.read(directions, outs)
            link.send((outcome, [bytes(out) for out in outs[: outcome.num_ok]]))
        else:
            link.send(files.write(directions, [memoryview(bytearray(chunk)) for chunk in chunks]))
    files.close()


class Other:
    """A process that follows directions."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self.process = context.Process(target=follow, args=(theirs, IO), daemon=True)
        self.process.start()
        theirs.close()

    def read(self, directions: ReadDirections) -> tuple[ReadOutcome, list[bytes]]:
        self._link.send(("read", directions.slots, None))
        return self._link.recv()

    def write(self, payloads, chunks) -> list[int]:
        self._link.send(("write", payloads, [bytes(chunk) for chunk in chunks]))
        return self._link.recv()

    def close(self) -> None:
        self._link.send(None)
        self.process.join(20)


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    other = Other()
    yield other
    other.close()


@pytest.fixture(params=["file", "striped2", "striped3"])
def shared_kit(request, tmp_path, layout) -> Iterator[StoreKit]:
    kit = StoreKit(request.param, tmp_path / "state", layout)
    yield kit
    kit.close()


def wanted_of(*records: SpanRecord) -> list[ChunkWanted]:
    return [
        ChunkWanted(
            span_id=record.span_id,
            layer_idx=chunk.layer_idx,
            num_bytes=chunk.num_bytes,
            kind=chunk.kind,
            shard=chunk.shard,
            num_shards=record.layout.shards_of(chunk.kind),
        )
        for record in records
        for chunk in record.layout.chunks
    ]


def directions_to(store: ChunkStore, *records: SpanRecord) -> ReadDirections:
    directions = store.directions(wanted_of(*records))
    assert directions is not None
    return directions


def share(store: ChunkStore, record: SpanRecord):
    draft = store.share_draft(record)
    assert draft is not None
    return draft


def test_another_process_reads_what_was_put(shared_kit, other):
    store = shared_kit.open()
    records = [shared_kit.record(name) for name in range(5)]
    assert all(put(store, record) for record in records)
    directions = directions_to(store, *records)
    assert directions.reason is None
    outcome, chunks = other.read(directions)
    assert outcome == ReadOutcome(num_ok=sum(record.layout.num_chunks for record in records))
    assert chunks == [bytes(chunk) for record in records for chunk in make_chunks(record)]
    before = store.stats().read_bytes
    directions.end(outcome)
    directions.end(outcome)
    assert store.stats().read_bytes - before == sum(record.num_bytes for record in records)
    assert all(holds(store, record) for record in records)


def test_directions_end_at_the_first_span_that_is_not_there(shared_kit, other):
    store = shared_kit.open()
    records = [shared_kit.record(name) for name in range(4)]
    for record in (records[0], records[1], records[3]):
        put(store, record)
    directions = directions_to(store, *records)
    assert directions.reason == "missing"
    num = 2 * records[0].layout.num_chunks
    outcome, chunks = other.read(directions)
    directions.end(outcome)
    assert (outcome.num_ok, len(directions.slots)) == (num, num)
    assert chunks == [bytes(chunk) for record in records[:2] for chunk in make_chunks(record)]
    assert directions_to(store).slots == ()


def test_a_span_that_two_processes_wrote_reads_back_also_after_a_restart(shared_kit, other):
    store = shared_kit.open()
    records = [shared_kit.record(name, parent=name - 1 if name else None, root=0, span_idx=name) for name in range(4)]
    own = SlotFiles(open_io(IO)[0])
    for record in records:
        draft, chunks = share(store, record), make_chunks(record)
        assert store.find(record.span_id) is None
        theirs = other.write(draft.payloads[1::2], chunks[1::2])
        ours = own.write(draft.payloads[::2], [memoryview(bytearray(chunk)) for chunk in chunks[::2]])
        crcs = [0] * len(chunks)
        crcs[::2], crcs[1::2] = ours, theirs
        assert crcs == [crc32c(chunk) for chunk in chunks]
        assert draft.publish(crcs)
        assert holds(store, record)
    own.close()
    store.flush()
    store = shared_kit.open()
    assert all(holds(store, record) for record in records)
    assert store.stats().num_spans == 4
    if shared_kit.num_paths > 1:
        assert {path.store.stats().num_spans for path in store.paths} <= {1, 2}, "round robin"


def test_a_wrong_checksum_is_a_miss_and_never_served(shared_kit, other):
    """The writer lies, or its disk does."""
    store, record = shared_kit.open(), shared_kit.record("a")
    draft = share(store, record)
    crcs = other.write(draft.payloads, make_chunks(record, writer=1))
    crcs[1] ^= 1
    assert draft.publish(crcs)
    outcome, _ = other.read(directions := directions_to(store, record))
    assert outcome == ReadOutcome(num_ok=1, reason="corrupt")
    directions.end(outcome)
    assert store.find(record.span_id) is None
    assert (store.stats().corrupt_chunks, store.why_missing(record.span_id)) == (1, "corrupt")
    assert put(store, record) and holds(store, record)


def test_slots_are_nobody_elses_until_the_reader_is_done(file_kit, other):
    store = file_kit.open_for(2)
    first, second, third = (file_kit.record(name) for name in "abc")
    put(store, first), put(store, second)
    directions = directions_to(store, first)
    store.delete([first.span_id])
    store.flush()
    assert put(store, third) and put(store, file_kit.record("d"))
    assert store.stats().num_spans == 1, "the room of the other one is still read"
    outcome, chunks = other.read(directions)
    assert outcome.reason is None and chunks == [bytes(chunk) for chunk in make_chunks(first)]
    directions.end(outcome)
    store.flush()
    assert all(put(store, file_kit.record(name)) for name in "efgh")
    assert store.stats().num_spans == 2


def test_directions_that_are_too_old_are_a_miss(file_kit, other):
    store = file_kit.open_for(1)
    first, second = file_kit.record("a"), file_kit.record("b")
    put(store, first)
    directions = directions_to(store, first)
    directions.end(ReadOutcome(num_ok=0))
    assert put(store, second), "the first one was evicted for it"
    outcome, _ = other.read(directions)
    assert outcome == ReadOutcome(num_ok=0, reason="missing")
    store.delete([second.span_id])
    store.flush()
    file_kit.close()
    outcome, _ = other.read(directions)
    assert outcome.num_ok == 0 and outcome.reason in ("missing", "corrupt")


def test_a_dropped_draft_is_free_room_and_an_abandoned_one_only_after_a_restart(file_kit, other):
    store = file_kit.open_for(1)
    first, second = file_kit.record("a"), file_kit.record("b")
    dropped = share(store, first)
    other.write(dropped.payloads, make_chunks(first))
    dropped.drop()
    abandoned = share(store, first)
    other.write(abandoned.payloads[:1], make_chunks(first)[:1])
    abandoned.abandon()
    assert not put(store, second), "somebody may still write there"
    store = file_kit.open_for(1)
    assert store.find(first.span_id) is None
    assert put(store, second) and holds(store, second)


def test_a_writer_that_is_killed_leaves_nothing_behind(file_kit):
    store, record = file_kit.open(4 * SPAN_DISK_BYTES + (1 << 20)), file_kit.record("a")
    other = Other()
    draft = share(store, record)
    other.write(draft.payloads[:1], make_chunks(record)[:1])
    other.process.kill()
    other.process.join(20)
    with pytest.raises((EOFError, OSError)):
        other.write(draft.payloads[1:], make_chunks(record)[1:])
    draft.abandon()
    store.flush()
    store = file_kit.open()
    assert store.find(record.span_id) is None
    assert put(store, record) and holds(store, record)


def test_only_one_of_two_drafts_becomes_the_span(shared_kit, other):
    store, record = shared_kit.open(), shared_kit.record("a")
    drafts = [share(store, record) for _ in range(2)]
    written = [other.write(draft.payloads, make_chunks(record, writer)) for writer, draft in enumerate(drafts)]
    assert all(draft.publish(crcs) for draft, crcs in zip(drafts, written, strict=True))
    assert holds(store, record, writer=0) or shared_kit.num_paths > 1
    store.delete([record.span_id])
    assert store.find(record.span_id) is None


@pytest.mark.parametrize("layout", ["uniform"], indirect=True)
def test_stores_that_only_one_process_can_read_say_so(kit):
    store, record = kit.open(), kit.record("a")
    put(store, record)
    is_shared = kit.kind == "file" or kit.num_paths > 1
    assert (store.directions(wanted_of(record)) is not None) == is_shared
    assert (store.share_draft(make_record("b")) is not None) == is_shared
