"""Several ranks in one process: each a fake engine with heads of its own, an engine thread, and its share of state."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.plans import StoragePlan, uniform_storage
from mii_hcache.runtime.following import FollowingState
from mii_hcache.runtime.gathering import Gathering
from mii_hcache.runtime.peers import Counted, PeerLostError
from mii_hcache.runtime.restore import RestoreOutcome
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver
from mii_hcache.runtime.sharded_saver import ShardedSaver
from mii_hcache.runtime.sharded_tiles import ShardedTiles
from mii_hcache.runtime.share import Share
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Stream
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.disk_io import ThreadsIO
from mii_hcache.storage.records import ReadOutcome, SpanRecord
from mii_hcache.storage.slot_files import SlotFiles
from tests.runtime.kit import (
    GIVE_UP_S,
    SEED,
    FakeBlocks,
    FakeEngine,
    PoisonedBuffers,
    PoisonedRing,
    history_hashes,
    rows_of,
    wait_until,
)


def heads_of(geometry: ModelGeometry, share: Share) -> range:
    """The kv heads that a rank has."""
    num = geometry.shard_kv_heads(share.num_ranks)
    first = share.rank * geometry.num_kv_heads // share.num_ranks
    return range(first, first + num)


def own_heads(rows: torch.Tensor, geometry: ModelGeometry, share: Share) -> torch.Tensor:
    """`[num_tokens, 2, heads of the rank, head_size]` of whole rows of K and V."""
    heads = heads_of(geometry, share)
    return rows.view(-1, 2, geometry.num_kv_heads, geometry.head_size)[:, :, heads.start : heads.stop]


class RankBlocks(FakeBlocks):
    """Of one rank."""

    _engine: RankEngine

    def write_kv(self, layer_idx: int, start: int, kv: torch.Tensor, stream: Stream) -> None:
        engine = self._engine
        num_heads = len(heads_of(engine.geometry, engine.share))
        assert kv.shape[1:] == (2, num_heads, engine.geometry.head_size) and kv.dtype is engine.dtype
        self._write("kv", layer_idx, start, kv.reshape(kv.shape[0], -1))

    def read_kv(self, layer_idx: int, start: int, out: torch.Tensor) -> None:
        engine = self._engine
        assert self._uid is not None
        hashes = engine.hashes[self._uid]
        assert start + out.shape[0] <= len(hashes), "read from blocks that hold nothing yet"
        rows = rows_of(hashes[start : start + out.shape[0]], ChunkKind.KV, layer_idx, engine.geometry)
        out.copy_(own_heads(rows, engine.geometry, engine.share))


class RankEngine(FakeEngine):
    """One rank's engine; rank 0's has the others run what it runs."""

    def __init__(self, ranks: Ranks, share: Share, geometry: ModelGeometry, max_batch_tokens: int) -> None:
        super().__init__(geometry, max_batch_tokens=max_batch_tokens)
        self.share = share
        self._ranks = ranks
        self.targets: dict[int, RankBlocks] = {}

    def target(self, uid: int) -> RankBlocks:
        if uid not in self.targets:
            self.targets[uid] = RankBlocks(self, uid)
        return self.targets[uid]

    def open(self, token_ids: Sequence[int] = ()) -> int:
        uid = super().open(token_ids)
        if self.share.rank == 0:
            self._ranks.order(("adopt", uid, list(token_ids)))
        return uid

    def adopt(self, uid: int, token_ids: list[int]) -> None:
        self.tokens[uid] = list(token_ids)
        self.hashes[uid] = history_hashes(token_ids)

    def truncate(self, uid: int, num_tokens: int) -> None:
        if self.share.rank == 0:
            self._ranks.order(("truncate", uid, num_tokens))
        super().truncate(uid, num_tokens)

    def evict(self, uid: int) -> None:
        if self.share.rank == 0:
            self._ranks.order(("evict", uid))
        super().evict(uid)

    def run(self, saver: Any, batch: dict[int, list[int]], fail_at_layer: int | None) -> None:
        super()._forward(saver, batch, fail_at_layer)

    def _forward(self, saver: Saver, batch: dict[int, list[int]], fail_at_layer: int | None) -> None:
        self._ranks.order(("run", {uid: list(tokens) for uid, tokens in batch.items()}, fail_at_layer))
        super()._forward(saver, batch, fail_at_layer)


class LeadBlocks:
    """What a restore on rank 0 fills and commits: all ranks' blocks."""

    def __init__(self, ranks: Ranks, uid: int) -> None:
        self._ranks = ranks
        self.uid = uid

    def fill(self, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        self._ranks.order(("fill", self.uid, start, token_ids, num_layers))
        self._ranks.engines[0].target(self.uid).fill(start, token_ids, num_layers)

    def commit(self, num_tokens: int) -> None:
        self._ranks.order(("commit", self.uid, num_tokens))
        self._ranks.engines[0].target(self.uid).commit(num_tokens)


class CountingFiles(SlotFiles):
    """Counts the bytes that go to and from each directory of segments, for one rank."""

    def __init__(self, moved: Counter[tuple[int, str]], rank: int) -> None:
        super().__init__(ThreadsIO())
        self._moved = moved
        self._rank = rank
        self._lock = threading.Lock()

    def read(self, slots: Any, outs: Any) -> ReadOutcome:
        outcome = super().read(slots, outs)
        self._count(slots[: outcome.num_ok], outs[: outcome.num_ok])
        return outcome

    def write(self, payloads: Any, chunks: Any) -> list[int]:
        crcs = super().write(payloads, chunks)
        self._count(payloads, chunks)
        return crcs

    def _count(self, places: Any, buffers: Any) -> None:
        with self._lock:  # several readers and writers count at once
            for place, buffer in zip(places, buffers, strict=True):
                self._moved[self._rank, Path(place.path).parent.parent.name] += buffer.nbytes


class Ranks:
    """`runtime.peers.Peers` over threads. Order and question really race; what is late, is late at random."""

    def __init__(self, geometry: ModelGeometry, num_ranks: int, *, max_batch_tokens: int = 256) -> None:
        self.num_ranks = num_ranks
        self.geometry = geometry
        self.shares = [Share(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        self.engines = [RankEngine(self, share, geometry, max_batch_tokens) for share in self.shares]
        self.lost: set[int] = set()
        self.errors: list[BaseException] = []
        self.moved: Counter[tuple[int, str]] = Counter()
        """Bytes that each follower wrote to, and read from, each state directory."""
        self.held_orders = threading.Event()
        """Followers carry out orders while it is set."""
        self.held_orders.set()
        self._meeting = threading.Barrier(num_ranks)
        self._rows: list[torch.Tensor] = [torch.empty(0)] * num_ranks
        self.counters = [Counters() for _ in range(num_ranks)]
        self.states: list[FollowingState | None] = [None]
        self._orders: list[queue.SimpleQueue[object]] = [queue.SimpleQueue() for _ in range(num_ranks)]
        with (
            mock.patch("mii_hcache.runtime.saver.RowRing", PoisonedRing),
            mock.patch("mii_hcache.runtime.cutter.SpanBuffers", PoisonedBuffers),
            mock.patch("mii_hcache.runtime.block_reader.SpanBuffers", PoisonedBuffers),
        ):
            for share, engine, counters in zip(self.shares[1:], self.engines[1:], self.counters[1:], strict=True):
                self.states.append(
                    FollowingState(
                        adapter=engine,
                        share=share,
                        gather=partial(self._gather, share.rank),
                        files=CountingFiles(self.moved, share.rank),
                        counters=counters,
                    )
                )
        self._questions: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(num_ranks)]
        self._threads, self._answerers = (
            [threading.Thread(target=target, args=(rank,), daemon=True) for rank in range(1, num_ranks)]
            for target in (self._follow, self._answer)
        )
        for thread in (*self._threads, *self._answerers):
            thread.start()

    # --- the port -----------------------------------------------------------------------------------------------

    def order(self, order: object) -> None:
        for orders in self._orders[1:]:
            orders.put(order)

    def ask(self, rank: int, question: object) -> Future[object]:
        answer: Future[object] = Future()
        state = self.states[rank]
        assert state is not None
        if rank in self.lost:
            answer.set_exception(PeerLostError(f"rank {rank} is gone"))
        else:
            self._questions[rank].put((question, answer.set_result))
        return answer

    def gather(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        self._gather(0, out, rows)

    # --- the rest -----------------------------------------------------------------------------------------------

    def _gather(self, rank: int, out: torch.Tensor, rows: torch.Tensor) -> None:
        self._rows[rank] = rows.clone()
        self._meeting.wait(GIVE_UP_S)
        assert len({rows.shape for rows in self._rows}) == 1, "ranks gather what does not fit together"
        torch.cat(self._rows, out=out)
        self._meeting.wait(GIVE_UP_S)

    def _answer(self, rank: int) -> None:
        state = self.states[rank]
        assert state is not None
        while (asked := self._questions[rank].get()) is not None:
            state.answer(*asked)

    def _follow(self, rank: int) -> None:
        engine, state = self.engines[rank], self.states[rank]
        assert state is not None
        try:
            while (order := self._orders[rank].get()) is not None:
                self.held_orders.wait(GIVE_UP_S)
                if not isinstance(order, tuple):
                    state.obey(order)
                    continue
                what, *arguments = order
                if what == "run":
                    batch, fail_at_layer = arguments
                    try:
                        engine.run(state, batch, fail_at_layer)
                    except RuntimeError:
                        assert fail_at_layer is not None
                elif what == "call":
                    arguments[0]()
                elif what in ("fill", "commit"):
                    uid, *arguments = arguments
                    getattr(engine.target(uid), what)(*arguments)
                else:
                    getattr(engine, what)(*arguments)
        except BaseException as error:
            self.errors.append(error)
            self._meeting.abort()

    def settle(self) -> None:
        """Wait until all followers have carried out all orders. Fails the test when one raised."""
        done = [threading.Event() for _ in self._threads]
        for orders, event in zip(self._orders[1:], done, strict=True):
            orders.put(("call", event.set))
        for event in done:
            wait_until(lambda event=event: bool(self.errors) or event.is_set())
        if self.errors:
            raise self.errors[0]

    def close(self) -> None:
        for waiting in (*self._orders[1:], *self._questions[1:]):
            waiting.put(None)
        for thread in (*self._threads, *self._answerers):
            thread.join(GIVE_UP_S)
        for state in self.states[1:]:
            assert state is not None
            state.stop()
        if self.errors:
            raise self.errors[0]

    def counted(self, name: str) -> list[float]:
        """A counter of every rank."""
        answers = [self.ask(rank, Counted()).result(GIVE_UP_S) for rank in range(1, self.num_ranks)]
        return [self.counters[0].get(name), *(answer.get(name, 0.0) for answer in answers)]  # type: ignore[attr-defined]

    def open_saver(self, store: ChunkStore, saved: ChunkKind | StoragePlan, **settings: Any) -> ShardedSaver:
        plan = uniform_storage(self.geometry, saved) if isinstance(saved, ChunkKind) else saved
        with (
            mock.patch("mii_hcache.runtime.saver.RowRing", PoisonedRing),
            mock.patch("mii_hcache.runtime.cutter.SpanBuffers", PoisonedBuffers),
            mock.patch("mii_hcache.runtime.block_reader.SpanBuffers", PoisonedBuffers),
            mock.patch("mii_hcache.runtime.sharded_saver.WRITE_DEADLINE_S", 10 * GIVE_UP_S),  # then it hangs, and shows
        ):
            return ShardedSaver(
                adapter=self.engines[0],
                store=store,
                plan=plan,
                max_batch_tokens=self.engines[0].max_batch_tokens,
                counters=self.counters[0],
                peers=self,
                **settings,
            )

    def open_restorer(self, store: ChunkStore, **settings: Any) -> Restorer:
        with mock.patch("mii_hcache.runtime.restorer.SpanBuffers", PoisonedBuffers):
            return Restorer(
                adapter=self.engines[0],
                store=store,
                counters=self.counters[0],
                open_tiles=partial(ShardedTiles, uid_of=lambda target: target.uid, peers=self),
                gathering=Gathering(share=self.shares[0], gather=self.gather),
                **settings,
            )

    def restore(
        self, store: ChunkStore, records: Sequence[SpanRecord], token_ids: Sequence[int], **settings: Any
    ) -> tuple[int, RestoreOutcome]:
        """Restore into a new sequence; its uid and what came back. All followers are done with it."""
        restorer = self.open_restorer(store, **settings.pop("restorer", {}))
        uid = self.engines[0].open()
        restore = restorer.start(LeadBlocks(self, uid), records, token_ids, **settings)
        outcome = None
        while outcome is None:
            outcome = restore.step(1.0, wait=True)
        self.settle()
        restorer.stop()
        return uid, outcome

    def expect_restored(
        self, uid: int, token_ids: Sequence[int], outcome: RestoreOutcome, records: Sequence[SpanRecord]
    ) -> None:
        """Every rank's blocks hold the right rows, in every layer, of as many tokens as came back, on all of them."""
        hashes = history_hashes(token_ids)
        for engine, share in zip(self.engines, self.shares, strict=True):
            target = engine.target(uid)
            assert target.committed == [outcome.num_tokens], "not all ranks agree"
            for layer_idx in range(self.geometry.num_layers):
                for kind in ChunkKind:
                    rows = rows_of(hashes, kind, layer_idx, self.geometry)
                    if kind is ChunkKind.KV:
                        rows = own_heads(rows, self.geometry, share).reshape(len(hashes), -1)
                    for position in range(outcome.recomputed_tokens, outcome.num_tokens):
                        source, written = target.written[layer_idx, position]
                        if source == kind.value:
                            assert written == rows[position].tolist(), (share, layer_idx, position, source)
                for position in range(outcome.recomputed_tokens, outcome.num_tokens):
                    source = target.written[layer_idx, position][0]
                    kind_there = records[position // SPAN_TOKENS].layout.kinds[layer_idx]
                    expected = ("tokens", "filled") if kind_there is None else (kind_there.value, "filled")
                    assert source in expected, (share, layer_idx, position, source)


def spans_in(store: ChunkStore, token_ids: Sequence[int]) -> list[SpanRecord]:
    """The records of a history, as far as they are there."""
    from mii_hcache.core.identity import spans_of

    records = []
    for span_id, _ in spans_of(SEED, token_ids):
        record = store.find(span_id)
        if record is None:
            break
        records.append(record)
    return records


def expected_chunks(record: SpanRecord, token_ids: Sequence[int], geometry: ModelGeometry) -> list[bytes]:
    """What every chunk of the span must hold, whoever wrote it."""
    from mii_hcache.runtime.buffers import as_bytes

    stop = (record.span_idx + 1) * SPAN_TOKENS
    hashes = history_hashes(token_ids[:stop])[-SPAN_TOKENS:]
    chunks = []
    for chunk in record.layout.chunks:
        rows = rows_of(hashes, chunk.kind, chunk.layer_idx, geometry)
        if chunk.kind is ChunkKind.KV:
            share = Share(rank=chunk.shard, num_ranks=record.layout.kv_shards)
            rows = own_heads(rows, geometry, share).contiguous()
        chunks.append(bytes(as_bytes(rows)))
    return chunks
