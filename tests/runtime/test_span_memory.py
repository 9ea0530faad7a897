"""The DRAM tier's memory is pinned where it can be, used to the last page, and gone with the last who borrows it."""

from __future__ import annotations

import gc

from mii_hcache.runtime import span_memory as module
from mii_hcache.runtime.pinned import PinnedMemory
from mii_hcache.runtime.span_memory import PinnedSpans, span_memory
from mii_hcache.storage.memory import MemoryStore
from tests.runtime.test_pinned import Books
from tests.storage.storage_kit import make_chunks, make_record, put, wanted_of

MIB = 1 << 20
SLAB = 8 * MIB


def _store(books: Books, capacity_bytes: int) -> tuple[MemoryStore, PinnedMemory]:
    pinned = PinnedMemory(books, slab_bytes=2 * MIB)
    return MemoryStore(capacity_bytes, memory=PinnedSpans(pinned, slab_bytes=SLAB)), pinned


def test_spans_fill_slabs_without_a_rest_and_memory_stays_bounded():
    """Three to a slab of 8 MiB would leave a quarter of it; a slab is as long as what fits into it."""
    books = Books()
    span_bytes = 3 * 680 * 1024
    store, pinned = _store(books, 12 * span_bytes)
    for idx in range(30):
        record = make_record(idx, chunk_bytes=680 * 1024)
        assert put(store, record)
        borrowed = store.borrow(wanted_of(record), must_be_pinned=True)
        assert list(borrowed.chunks) == make_chunks(record)
        borrowed.give_back()
        assert pinned.pinned_bytes <= 12 * span_bytes + SLAB
    assert books.num_registered == 3 and pinned.plain_bytes == 0
    store.close()
    del borrowed, store
    gc.collect()
    assert pinned.pinned_bytes == 0 and not books.registered


def test_pinned_memory_of_a_closed_store_stays_while_it_is_lent():
    books = Books()
    store, _ = _store(books, 4 * MIB)
    record = make_record("a")
    put(store, record)
    borrowed = store.borrow(wanted_of(record), must_be_pinned=True)
    store.delete([record.span_id])
    store.close()
    del store
    gc.collect()
    assert list(borrowed.chunks) == make_chunks(record) and len(books.registered) == 1
    borrowed.give_back()
    gc.collect()
    assert not books.registered


def test_what_cannot_be_pinned_is_not_lent_to_a_device(caplog):
    books = Books()
    books.refusal = "the limit on locked memory"
    store, pinned = _store(books, 4 * MIB)
    record = make_record("a")
    assert put(store, record)
    assert store.borrow(wanted_of(record), must_be_pinned=True) is None
    store.borrow(wanted_of(record)).give_back()
    assert pinned.plain_bytes and "could not be pinned" in caplog.text
    store.close()


def test_there_is_none_without_a_device(monkeypatch):
    monkeypatch.setattr(module, "pinned_memory", lambda: None)
    assert span_memory() is None
    monkeypatch.setattr(module, "pinned_memory", lambda: PinnedMemory(Books()))
    assert isinstance(span_memory(), PinnedSpans)
