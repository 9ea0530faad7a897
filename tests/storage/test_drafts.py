"""Spans written row by row: they are spans only once published, and their room is nobody else's until then."""

from __future__ import annotations

import random

import pytest

from mii_hcache.storage.drafts import RowWrite, SpanDraft
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.native import why_no_uring
from mii_hcache.storage.state_dir import StateDir
from tests.storage.storage_kit import MIXED, SPAN_DISK_BYTES, holds, make_chunks, make_record, put, wait_until_here

WHY_NO_URING = why_no_uring()
IO = ["threads", pytest.param("uring", marks=pytest.mark.skipif(WHY_NO_URING is not None, reason=str(WHY_NO_URING)))]


@pytest.fixture(params=IO)
def reopen(tmp_path, request):
    """Opens the store, again if need be: the one before ends as it is, without a word to its drafts."""
    opened = []

    def close():
        for one in opened:
            one.close()
        opened.clear()

    def open_store(capacity_bytes: int = 64 << 20) -> FileStore:
        close()
        state_dir = StateDir(tmp_path / "state")
        opened.extend([FileStore(state_dir, capacity_bytes, io=request.param), state_dir])
        return opened[0]

    yield open_store
    close()


def begin(store: FileStore, record) -> SpanDraft:
    draft = store.drafts.begin(record.layout)
    assert draft is not None
    return draft


def write_all(store: FileStore, draft: SpanDraft, record, writer: int = 0) -> None:
    """In pieces of any size and order, some of them twice, in several batches."""
    chooser = random.Random(1)
    pieces = []
    for chunk_idx, chunk in enumerate(make_chunks(record, writer)):
        start = 0
        while start < len(chunk):
            stop = start + chooser.choice([1, 700, 4096])
            pieces.append(RowWrite(draft, chunk_idx, start, memoryview(bytearray(chunk[start:stop]))))
            start = stop
    chooser.shuffle(pieces)
    for at in range(0, len(pieces), 5):
        store.drafts.write(pieces[at : at + 5])
    store.drafts.write(pieces[:3])


@pytest.mark.parametrize("layout", [None, MIXED], ids=["uniform", "mixed"])
def test_what_was_written_in_pieces_reads_back_whole_also_from_the_disk(reopen, layout):
    store = reopen()
    records = [make_record(name, layout=layout) for name in "abc"]
    put(store, records[1])
    drafts = [begin(store, records[0]), begin(store, records[2])]
    for draft, record in zip(drafts, records[::2], strict=True):
        write_all(store, draft, record)
        assert store.find(record.span_id) is None
    for draft, record in zip(drafts, records[::2], strict=True):
        assert store.drafts.publish(draft, record, make_chunks(record))
    for _ in range(2):
        assert all(holds(store, record) for record in records)
        assert store.stats().num_spans == 3
        store = reopen()


def test_a_draft_that_was_never_published_leaves_free_room(reopen):
    """As after a crash: nothing on the disk names what was written."""
    store = reopen(4 * SPAN_DISK_BYTES + (1 << 20))
    write_all(store, begin(store, make_record("lost")), make_record("lost"))
    put(store, make_record("kept"))
    store = reopen(4 * SPAN_DISK_BYTES + (1 << 20))
    assert store.find(make_record("lost").span_id) is None and holds(store, make_record("kept"))
    assert store.stats().num_spans == 1
    before = store.disk_bytes
    assert put(store, make_record("new")) and holds(store, make_record("new"))
    assert store.disk_bytes <= before + SPAN_DISK_BYTES


def test_room_of_a_draft_is_nobody_elses_until_it_is_dropped(reopen):
    capacity_bytes = 2 * SPAN_DISK_BYTES + 2 * 4096  # two spans, and the headers of a segment
    store = reopen(capacity_bytes)
    draft, second = begin(store, make_record("a")), begin(store, make_record("b"))
    write_all(store, draft, make_record("a"))
    assert not put(store, make_record("c")), "there is no room that anybody could give"
    store.drafts.drop(second)
    assert put(store, make_record("c"))
    assert put(store, make_record("d")), "the span goes, the draft stays"
    assert store.drafts.publish(draft, make_record("a"), make_chunks(make_record("a")))
    assert holds(store, make_record("a"))


def test_the_first_writer_wins(reopen):
    store, record = reopen(), make_record("a")
    draft = begin(store, record)
    write_all(store, draft, record, writer=1)
    put(store, record, writer=0)
    assert store.drafts.publish(draft, record, make_chunks(record, 1))
    assert holds(store, record, writer=0) and store.stats().num_spans == 1
    store.delete([record.span_id])
    store.flush()
    assert store.disk_bytes <= 2 * SPAN_DISK_BYTES


def test_bytes_that_were_not_written_are_never_served(reopen):
    store, record = reopen(), make_record("a")
    draft = begin(store, record)
    write_all(store, draft, record)
    store.drafts.write([RowWrite(draft, 1, 100, memoryview(bytearray(b"\xff" * 10)))])
    assert store.drafts.publish(draft, record, make_chunks(record))
    assert not holds(store, record) and store.stats().corrupt_chunks == 1


def test_a_header_that_cannot_be_written_costs_the_span_and_no_room(reopen, monkeypatch):
    store, record = reopen(), make_record("a")
    draft = begin(store, record)
    write_all(store, draft, record)
    with monkeypatch.context() as patch:
        patch.setattr(store.io, "write_parts", lambda parts: (_ for _ in ()).throw(OSError(5, "the device is gone")))
        with pytest.raises(OSError, match="the device is gone"):
            store.drafts.publish(draft, record, make_chunks(record))
    assert store.find(record.span_id) is None
    wait_until_here(store)
    assert put(store, record) and holds(store, record)
    assert store.disk_bytes <= 2 * SPAN_DISK_BYTES


def test_a_closed_store_takes_no_drafts(reopen):
    store, record = reopen(), make_record("a")
    draft = begin(store, record)
    store.close()
    assert store.drafts.begin(record.layout) is None
    with pytest.raises(OSError, match="closed"):
        store.drafts.write([RowWrite(draft, 0, 0, memoryview(bytearray(10)))])
    assert not store.drafts.publish(draft, record, make_chunks(record))
    store.drafts.drop(draft)
