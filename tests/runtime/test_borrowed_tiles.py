"""What the DRAM tier lends is copied by a device from where it lies, late, while others evict, delete and close."""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
import weakref
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import SpanId
from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.lent_rows import LentRows
from mii_hcache.runtime.placing import _CopiesOfPieces
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.streams import HostStream, Stream
from mii_hcache.storage import memory as memory_module
from mii_hcache.storage.borrowing import BorrowedChunks, SpanMemory
from mii_hcache.storage.directions import ChunkWanted
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.records import ReadOutcome
from tests.fake_device import FakeStream, FakeStreams
from tests.races import RaceError
from tests.runtime.device_kit import Device, PoolBlocks, device_restorer
from tests.runtime.kit import (
    FakeBlocks,
    FakeEngine,
    geometry_of,
    open_restorer,
    path,
    span_chunks,
    span_record,
    wait_until,
)

HIDDEN, KV = ChunkKind.HIDDEN, ChunkKind.KV


class _ForgetfulStream(FakeStream):
    """As a GPU's: a copy that was launched keeps no memory alive."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        watched = self._streams.checker.watches(source.data_ptr())
        if watched is not None and watched.name.startswith("span memory"):
            raw = (ctypes.c_ubyte * source.nbytes).from_address(source.data_ptr())
            source = torch.frombuffer(raw, dtype=source.dtype).view(source.shape)
        super().copy(target, source)


class _ForgetfulStreams(FakeStreams):
    def new(self, *, is_urgent: bool = False) -> Stream:
        stream = _ForgetfulStream(self, f"side stream {len(self.side)}")
        self.side.append(stream)
        return stream


class _TracedMemory(SpanMemory):
    """Watched, poisoned when it is gone, and in truth never gone: who reads it late reads poison, and is told of."""

    def __init__(self, streams: FakeStreams) -> None:
        self._streams = streams
        self._kept: list[torch.Tensor] = []
        self.gone: list[str] = []
        """By which thread; they go on any, several at a time."""

    def new_buffer(self, num_bytes: int) -> memoryview:
        backing = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
        self._kept.append(backing)
        self._streams.checker.watch(backing, f"span memory {len(self._kept)}", self._streams.checker.host)
        piece = (ctypes.c_ubyte * num_bytes).from_buffer(as_bytes(backing))
        weakref.finalize(piece, self._gone, backing).atexit = False
        return as_bytes(torch.frombuffer(piece, dtype=torch.uint8))

    def is_pinned(self, buffer: memoryview) -> bool:
        return True

    def _gone(self, backing: torch.Tensor) -> None:
        self.gone.append(threading.current_thread().name)
        for actor in list(self._streams.checker._actors.values()):  # threads are put in order by counting references
            if actor.name.startswith("host"):
                self._streams.checker.acquire(actor.clock)
        with contextlib.suppress(RaceError):  # a finalizer cannot raise, but `races` keeps it
            self._streams.checker.note(backing, writes=True, label="gone")
        backing.numpy()[:] = 0xFF


class _Store(MemoryStore):
    """Tells how often it lent, and lets nobody read otherwise."""

    num_lent = 0

    def borrow(self, *args: Any, **kwargs: Any) -> BorrowedChunks | None:
        borrowed = super().borrow(*args, **kwargs)
        assert borrowed is not None
        self.num_lent += len(borrowed.chunks)
        return borrowed

    def get_into(self, reads: Any) -> ReadOutcome:
        raise AssertionError("there is a copy on the host")


class _World:
    """A device, a store whose memory is watched, and contexts in it."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = Device(seed)
        self.chooser = self.device.chooser
        self.streams = self.device.streams = _ForgetfulStreams(seed, haste=self.chooser.choice([0.01, 0.05, 0.2]))
        self.geometry = self.device.engine.geometry
        self.device.pool = type(self.device.pool)(self.streams, self.geometry, 160, self.chooser)
        self.memory = _TracedMemory(self.streams)
        span_bytes = max(self.geometry.span_bytes(kind) for kind in ChunkKind)
        self.store = _Store(12 * span_bytes, memory=self.memory)
        self._num_branches = 0
        copy_in = memory_module._copy_in

        def noted(record: Any, chunks: Any, buffer: memoryview) -> Any:
            address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
            self.streams.checker.note_bytes(address, len(buffer), writes=True, label="put")
            return copy_in(record, chunks, buffer)

        monkeypatch.setattr(memory_module, "_copy_in", noted)

    def put(self, num_spans: int) -> tuple[list[int], list[ChunkKind], list[Any]]:
        """A new context, which drives out what is older: its tokens, kinds, and records of spans that found room."""
        self._num_branches += 1
        kinds = [self.chooser.choice([HIDDEN, KV]) for _ in range(num_spans)]
        tokens = path(self._num_branches, 0, num_spans * SPAN_TOKENS)
        records = []
        for span_idx, kind in enumerate(kinds):
            history = tokens[: (span_idx + 1) * SPAN_TOKENS]
            record = span_record(history, kind, self.geometry)
            chunks = [memoryview(chunk) for chunk in span_chunks(history, kind, self.geometry)]
            if not self.store.put(record, chunks):
                break
            records.append(record)
        return tokens[: len(records) * SPAN_TOKENS], kinds[: len(records)], records


def _source(kinds: list[ChunkKind], layer_idx: int, position: int) -> str:
    kind = kinds[position // SPAN_TOKENS]
    return "tokens" if kind is HIDDEN and layer_idx == 0 else kind.value


def _talk(world: _World, *, num_contexts: int = 6, closes_early: bool = False) -> None:
    chooser, streams, store = world.chooser, world.streams, world.store
    with streams.watching():
        restorer = device_restorer(
            streams, world.device.engine, store, tile_spans=chooser.randint(1, 4), read_ahead_bytes=1
        )
        store.get_into = partial(_Store.get_into, store)  # type: ignore[method-assign]
        live: list[tuple[Any, PoolBlocks, list[int], list[ChunkKind]]] = []
        num_opened = 0
        while num_opened < num_contexts or live:
            if num_opened < num_contexts and len(live) < 3 and chooser.random() < 0.4:
                num_opened += 1
                tokens, kinds, records = world.put(chooser.randint(1, 5))
                if records:
                    blocks = PoolBlocks(world.device.pool, len(tokens))
                    live.append((restorer.start(blocks, records, tokens), blocks, tokens, kinds))
            if chooser.random() < 0.2:
                world.put(chooser.randint(1, 6))
            if chooser.random() < 0.05:
                store.delete([chooser.choice(store.span_ids() or [SpanId(bytes(32))])])
            for one in list(live):
                restore, blocks, tokens, kinds = one
                if restore.can_work and chooser.random() < 0.08:  # not more often because the machine is slow
                    restore.cancel()
                elif restore.step(0.0, wait=chooser.random() < 0.5) is not None:
                    blocks.check(tokens, partial(_source, kinds))
                else:
                    continue
                live.remove(one)
                blocks.give_back()
        if closes_early:
            store.close()
            del store._spare
        streams.run_all()
        restorer.stop()
        if not closes_early:
            assert store.num_lent > 0
            store.delete(store.span_ids())
            wait_until(lambda: store._lent_bytes == 0)  # also what was read for who had been cancelled
            assert store.stats().num_bytes == 0
            store.close()
    assert restorer.buffers.num_in_use == 0 and restorer.buffers._made == 0, "there was a host buffer"
    restore = one = None
    wait_until(lambda: len(world.memory.gone) == len(world.memory._kept))
    assert not streams.checker.races


@pytest.mark.parametrize("closes_early", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_byte_is_there_whoever_evicts_deletes_or_closes(seed, closes_early, monkeypatch):
    _talk(_World(seed, monkeypatch), closes_early=closes_early)


def _give_back_at_once(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Restorer, "give_back", lambda self, release, copied: release())


def _lend_without_holding(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    borrow = _Store.borrow

    def careless(self: _Store, *args: Any, **kwargs: Any) -> BorrowedChunks:
        borrowed = borrow(self, *args, **kwargs)
        chunks, outcome = borrowed.chunks, borrowed.outcome
        borrowed.give_back()
        return BorrowedChunks(chunks, outcome)

    monkeypatch.setattr(_Store, "borrow", careless)


def _keep_no_views(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed store's memory is held by its borrowers alone."""
    monkeypatch.setattr(Restorer, "give_back", lambda self, release, copied: None)


@pytest.mark.parametrize(
    ("mistake", "closes_early"),
    [(_give_back_at_once, False), (_lend_without_holding, False), (_keep_no_views, True)],
)
def test_no_mistake_goes_unnoticed(mistake, closes_early, monkeypatch):
    """By those tests."""
    for seed in range(40):
        with monkeypatch.context() as patch:
            world = _World(seed, patch)
            mistake(world, patch)
            try:
                _talk(world, closes_early=closes_early)
            except AssertionError as error:
                assert "never happened" not in str(error), "only that something is missing at the end"
                return
    pytest.fail("nobody notices")


# --- which way a tile comes -----------------------------------------------------------------------------------------


def _filled(
    engine: FakeEngine, kind: ChunkKind, num_spans: int, **settings: Any
) -> tuple[MemoryStore, list[int], list[Any]]:
    store = MemoryStore(1 << 24, **settings)
    tokens = path(1, 0, num_spans * SPAN_TOKENS)
    records = []
    for span_idx in range(num_spans):
        history = tokens[: (span_idx + 1) * SPAN_TOKENS]
        records.append(span_record(history, kind, engine.geometry))
        assert store.put(records[-1], [memoryview(one) for one in span_chunks(history, kind, engine.geometry)])
    return store, tokens, records


@pytest.mark.parametrize("kind", list(ChunkKind))
def test_a_device_reads_through_host_buffers_what_is_not_pinned(kind):
    device = Device(3)
    store, tokens, records = _filled(device.engine, kind, 5)
    with device.streams.watching():
        restorer = device_restorer(device.streams, device.engine, store, tile_spans=2)
        blocks = PoolBlocks(device.pool, len(tokens))
        restore = restorer.start(blocks, records, tokens)
        while restore.step(1.0, wait=True) is None:
            pass
        blocks.check(tokens, partial(_source, [kind] * 5))
        assert restorer.buffers._made > 0
        device.streams.run_all()
        restorer.stop()
    store.close()


def test_damage_in_what_is_lent_cuts_the_restore_there(monkeypatch):
    world = _World(5, monkeypatch)
    tokens, kinds, records = world.put(5)
    with world.store.held(records[3].span_id) as span:
        span.chunk(1)[9] ^= 1
    with world.streams.watching():
        restorer = device_restorer(world.streams, world.device.engine, world.store, tile_spans=8)
        blocks = PoolBlocks(world.device.pool, len(tokens))
        restore = restorer.start(blocks, records, tokens)
        while (outcome := restore.step(1.0, wait=True)) is None:
            pass
        assert (outcome.num_tokens, outcome.cut_reason) == (3 * SPAN_TOKENS, "corrupt")
        blocks.check(tokens, partial(_source, kinds))
        world.streams.run_all()
        restorer.stop()
    assert world.store.stats().corrupt_chunks == 1
    assert world.store.find(records[3].span_id) is None


def test_a_read_that_is_given_up_gives_back_what_it_borrowed():
    """Also when it ends only afterwards."""
    engine = FakeEngine(geometry_of())
    store, tokens, records = _filled(engine, KV, 3)
    gate, entered = threading.Event(), threading.Event()
    borrow = store.borrow

    def late(*args: Any, **kwargs: Any) -> BorrowedChunks | None:
        entered.set()
        assert gate.wait(30)
        return borrow(*args, **kwargs)

    store.borrow = late  # type: ignore[method-assign]
    restorer = open_restorer(engine, store)
    restore = restorer.start(FakeBlocks(engine), records, tokens)
    restore.read_ahead()
    assert entered.wait(30)
    restore.cancel()
    gate.set()
    restorer.stop()
    store.delete([record.span_id for record in records])
    wait_until(lambda: store._lent_bytes == 0)  # who was given up is not waited for
    store.close()


# --- K and V from pieces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_lent", [False, True])
@pytest.mark.parametrize("step", [1, SPAN_TOKENS])
@pytest.mark.parametrize("seed", range(10))
def test_copies_of_rows_are_made_from_pieces_wherever_runs_begin(seed, step, is_lent):
    """Runs of blocks begin and end within spans, or where these do, and are longer than they are."""
    chooser = random.Random(seed)
    whole = torch.arange(5 * SPAN_TOKENS * 4, dtype=torch.float32).view(-1, 2, 1, 2)
    pieces = [piece.clone() for piece in whole.split(SPAN_TOKENS)]
    copies = _CopiesOfPieces(lent_rows(pieces) if is_lent else pieces)
    target = torch.zeros_like(whole)
    cuts = sorted({0, len(whole), *chooser.choices(range(0, len(whole), step), k=chooser.randrange(9))})
    runs = list(pairwise(cuts))
    chooser.shuffle(runs)
    copies.copy_many([(target[start:stop], copies.whole[start:stop]) for start, stop in runs])
    for out, source in copies.pairs:
        out.copy_(source)
    stream = HostStream()
    for out, sources in copies.joined:
        stream.copy_joined(out, sources)
    assert torch.equal(target, whole)
    if step == SPAN_TOKENS:
        assert not copies.pairs and len(copies.joined) == len(runs)


def lent_rows(pieces: list[torch.Tensor]) -> LentRows:
    addresses = [piece.data_ptr() for piece in pieces]
    return LentRows([as_bytes(piece) for piece in pieces], addresses, pieces[0].dtype, tuple(pieces[0].shape))


def test_lent_rows_are_the_tensors_that_they_stand_for():
    pieces = list(torch.arange(4 * SPAN_TOKENS * 6, dtype=torch.float32).view(4, SPAN_TOKENS, 6).unbind())
    rows = lent_rows(pieces)
    assert len(rows) == 4 and rows.nbytes == sum(piece.nbytes for piece in pieces)
    assert all(torch.equal(one, other) for one, other in zip(rows, pieces, strict=True))
    some = rows[1:3].shaped(SPAN_TOKENS, 2, 3)
    assert isinstance(some, LentRows) and some.addresses == rows.addresses[1:3] and some.nbytes == rows.nbytes // 2
    assert torch.equal(some[1], pieces[2].view(SPAN_TOKENS, 2, 3))
    assert [one.data_ptr() for one in some] == some.addresses


def test_what_memory_lends_says_where_it_lies():
    store = MemoryStore(1 << 20)
    geometry, token_ids = geometry_of(num_layers=3), path(1, 0, SPAN_TOKENS)
    record = span_record(token_ids, HIDDEN, geometry)
    assert store.put(record, [memoryview(chunk) for chunk in span_chunks(token_ids, HIDDEN, geometry)])
    wanted = [
        ChunkWanted(span_id=record.span_id, layer_idx=chunk.layer_idx, num_bytes=chunk.num_bytes)
        for chunk in record.layout.chunks
    ]
    borrowed = store.borrow(wanted)
    places = [ctypes.addressof(ctypes.c_char.from_buffer(chunk)) for chunk in borrowed.chunks]
    assert borrowed.addresses == places and len(set(places)) == len(wanted) == 2
    borrowed.give_back()
    store.close()


def test_a_target_that_would_do_more_than_copy_rows_is_our_own_bug():
    copies = _CopiesOfPieces(torch.zeros(2, SPAN_TOKENS, 2, 1, 2).unbind())
    target = torch.zeros(2 * SPAN_TOKENS, 2, 1, 2)
    for source in (copies.whole.flip(1), copies.whole + 1, copies.whole.transpose(1, 3), torch.zeros_like(target)):
        with pytest.raises(AssertionError):
            copies.copy(target, source)
    for call in (partial(copies.launch, list), copies.record, partial(copies.wait, None)):
        with pytest.raises(AssertionError):
            call()
    assert not copies.pairs
