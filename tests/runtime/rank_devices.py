"""Several ranks on one fake device, streams and blocks of their own each: their gathers meet, all else may be late."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.identity import SpanId
from mii_hcache.runtime.following import FollowingState
from mii_hcache.runtime.gathering import Gathering
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.sharded_tiles import ShardedTiles
from mii_hcache.runtime.share import Share
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.disk_io import ThreadsIO
from mii_hcache.storage.passing import PassingStore
from mii_hcache.storage.records import ChunkRead, ReadOutcome
from mii_hcache.storage.slot_files import SlotFiles
from tests.fake_device import FakeStream, FakeStreams
from tests.runtime.device_kit import Pool, PoolBlocks, TracedBuffers, device_restorer
from tests.runtime.kit import FakeEngine, history_hashes, rows_of
from tests.runtime.ranks_kit import heads_of, own_heads


class Meeting:
    """Gathers are done when the streams of all ranks have come to theirs, for all of them at once."""

    def __init__(self, streams: FakeStreams, num_ranks: int) -> None:
        self.streams = streams
        self.gathers = [RankGather(self, rank) for rank in range(num_ranks)]
        self.num_met = 0

    def at(self, gather: RankGather) -> FakeStream | None:
        """The stream that has come to a rank's next gather."""
        for stream in self.streams.side:
            if stream.queue and stream.queue[0][0] == "work" and getattr(stream.queue[0][1], "func", None) is gather:
                return stream
        return None

    def meet(self, last: RankGather, out: torch.Tensor, rows: torch.Tensor) -> None:
        checker = self.streams.checker
        actors, outs, parts = [], [], []
        for gather in self.gathers:
            if gather is last:
                actors.append(self.streams.acting[-1])
                outs.append(out)
                parts.append(rows)
                continue
            stream = self.at(gather)
            assert stream is not None
            _, what, launched = stream.queue[0]
            checker.acquire(launched, stream.actor)
            actors.append(stream.actor)
            outs.append(what.args[0])
            parts.append(what.args[1])
            gather.is_done = True
        assert len({part.shape for part in parts}) == 1, "ranks gather what does not fit together"
        self._merge(actors)
        for actor, one in zip(actors, outs, strict=True):
            with self.streams.acting_as(actor):
                one.copy_(torch.cat(parts))
        self._merge(actors)
        self.num_met += 1

    def _merge(self, actors: Sequence[Any]) -> None:
        """Nobody goes on before all are there."""
        clocks = [self.streams.checker.release(actor) for actor in actors]
        for actor in actors:
            for clock in clocks:
                self.streams.checker.acquire(clock, actor)


class RankGather:
    """One rank's `GatherRows`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.is_done = False
        """The others did it."""

    @property
    def can_run(self) -> bool:
        return self.is_done or all(self._meeting.at(one) and not one.is_done for one in self._meeting.gathers)

    def __call__(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        if self.is_done:
            self.is_done = False
        else:
            self._meeting.meet(self, out, rows)


class CutStore(PassingStore):
    """Rank 0 cannot read some spans."""

    def __init__(self, inner: ChunkStore) -> None:
        super().__init__(inner)
        self.unreadable: set[SpanId] = set()

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        outcome = self._inner.get_into(reads)
        for idx, read in enumerate(reads[: outcome.num_ok]):
            if read.span_id in self.unreadable:
                return ReadOutcome(num_ok=idx, reason="missing")
        return outcome


class RankPoolBlocks(PoolBlocks):
    """Of one rank: what it projects of a hidden state are columns of its own."""

    def __init__(self, pool: Pool, num_tokens: int, share: Share, geometry: ModelGeometry) -> None:
        super().__init__(pool, num_tokens)
        self._share, self._geometry = share, geometry

    def _own_columns(self, hidden: torch.Tensor) -> torch.Tensor:
        width = self.pool.rows[0, 0].numel()
        first = self._share.rank * width % hidden.shape[1]
        return hidden[:, first : first + width]

    def project_hidden(self, layer_idx: int, start: int, hidden: torch.Tensor) -> None:
        super().project_hidden(layer_idx, start, self._own_columns(hidden))

    def check(self, token_ids: Sequence[int], sources: Callable[[int, int], str]) -> None:
        num_tokens = self.committed or 0
        hashes = history_hashes(token_ids[:num_tokens])
        for layer_idx in range(self._geometry.num_layers if num_tokens else 0):
            rows = self.pool.rows[layer_idx][self.slots[:num_tokens]].flatten(1)
            hidden = rows_of(hashes, ChunkKind.HIDDEN, layer_idx, self._geometry)
            kv = rows_of(hashes, ChunkKind.KV, layer_idx, self._geometry)
            ids = torch.tensor(token_ids[:num_tokens], dtype=torch.float32)
            values = {
                "tokens": ids[:, None].expand(-1, rows.shape[1]),
                "hidden": 2 * self._own_columns(hidden) + 1,
                "kv": own_heads(kv, self._geometry, self._share).flatten(1),
            }
            for start in range(0, num_tokens, SPAN_TOKENS):
                expected = values[sources(layer_idx, start)][start : start + SPAN_TOKENS]
                assert torch.equal(rows[start : start + SPAN_TOKENS], expected), (
                    f"layer {layer_idx}, token {start}, rank {self._share.rank}"
                )


class RankDevice(FakeEngine):
    """One rank's engine: blocks that hold NaN where nothing is."""

    def __init__(self, streams: FakeStreams, geometry: ModelGeometry, share: Share, chooser: random.Random) -> None:
        super().__init__(geometry)
        self.share = share
        own = replace(geometry, num_kv_heads=len(heads_of(geometry, share)))
        self.pool = Pool(streams, own, 160, chooser)
        self.blocks: dict[int, RankPoolBlocks] = {}

    def target(self, uid: int) -> RankPoolBlocks:  # type: ignore[override]
        return self.blocks[uid]


class AllBlocks:
    """A sequence's blocks on all ranks."""

    def __init__(self, engines: Sequence[RankDevice], uid: int, num_tokens: int) -> None:
        self.uid = uid
        self._engines = engines
        for engine in engines:
            engine.blocks[uid] = RankPoolBlocks(engine.pool, num_tokens, engine.share, engine.geometry)

    @property
    def each(self) -> list[RankPoolBlocks]:
        return [engine.blocks[self.uid] for engine in self._engines]

    def fill(self, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        for blocks in self.each:
            blocks.fill(start, token_ids, num_layers)

    def commit(self, num_tokens: int) -> None:
        for blocks in self.each:
            blocks.commit(num_tokens)

    def check(self, token_ids: Sequence[int], sources: Callable[[int, int], str]) -> None:
        for blocks in self.each:
            blocks.check(token_ids, sources)

    def give_back(self) -> None:
        for engine in self._engines:
            engine.blocks.pop(self.uid).give_back()


class RankDevices:
    """`Peers` whose followers obey at once; what they launch is late. Within `streams.watching()`, and with
    `following_tiles.SpanBuffers` as `buffers_of` makes it."""

    def __init__(
        self, store: ChunkStore, geometry: ModelGeometry, num_ranks: int, streams: FakeStreams, chooser: random.Random
    ) -> None:
        self.num_ranks = num_ranks
        self.streams = streams
        self.store = CutStore(store)
        self.meeting = Meeting(streams, num_ranks)
        shares = [Share(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        self.engines = [RankDevice(streams, geometry, share, chooser) for share in shares]
        self.followers = [
            FollowingState(
                adapter=engine,
                share=share,
                gather=gather,
                files=SlotFiles(ThreadsIO()),
                counters=Counters(),
                streams=streams,
            )
            for engine, share, gather in list(zip(self.engines, shares, self.meeting.gathers, strict=True))[1:]
        ]
        self.restorer: Restorer = device_restorer(
            streams,
            self.engines[0],
            self.store,
            tile_spans=chooser.randint(1, 2 * num_ranks),
            read_ahead_bytes=1,
            open_tiles=partial(ShardedTiles, uid_of=lambda target: target.uid, peers=self),
            gathering=Gathering(share=shares[0], gather=self.meeting.gathers[0]),
        )

    def order(self, order: object) -> None:
        self.streams.allocating = "a follower's ring" if type(order).__name__ == "OpenRestore" else None
        try:
            for follower in self.followers:
                follower.obey(order)
        finally:
            self.streams.allocating = None

    def ask(self, rank: int, question: object) -> Future[object]:
        answer: Future[object] = Future()
        self.followers[rank - 1].answer(question, answer.set_result)
        return answer

    def collect(self) -> None:
        self.restorer.collect()
        for follower in self.followers:
            follower.tiles.collect()

    def stop(self) -> None:
        self.restorer.stop()
        for follower in self.followers:
            follower.stop()


class _HandedBuffers(TracedBuffers):
    """A lock hands a part from the thread that began its read to the one that gives it back."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._handed: dict[int, Any] = {}

    def acquire(self, wait_s: float = 0.0) -> torch.Tensor | None:
        buffer = super().acquire(wait_s)
        self._handed[id(buffer)] = self.streams.checker.release()
        return buffer

    def release(self, buffer: torch.Tensor) -> None:
        self.streams.checker.acquire(self._handed.pop(id(buffer)))
        super().release(buffer)


def buffers_of(streams: FakeStreams) -> Any:
    """A class of a follower's host buffers, which are watched."""
    return type("Buffers", (_HandedBuffers,), {"streams": streams})
