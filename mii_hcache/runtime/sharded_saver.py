"""Saving by several ranks: rank 0's side.

Each rank captures what is its own; rank 0 decides what is saved, and owns the store. In the stream of orders it says
which spans of a step are put; its background threads then take room, have every rank write its chunks there, and
publish the span when all of them have. A rank that lost its rows, or fails, costs the span, which is healed later from
the blocks of all ranks.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from typing import Any

from mii_hcache.core.identity import SpanId
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.flusher import Flusher
from mii_hcache.runtime.peers import (
    AbortStep,
    BeginStep,
    CloseSequence,
    DropPart,
    EndStep,
    Failed,
    HealSpan,
    OpenSequence,
    Peers,
    StartSaving,
    TruncateSequence,
    WritePart,
    Written,
)
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.saver import HEAL_WAIT_S, Saver, StepSegment
from mii_hcache.runtime.scatter import Scatter
from mii_hcache.runtime.share import Share
from mii_hcache.runtime.snapshot import Snapshot, SpanPut
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.track import SequenceTrack
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.directions import SharedDraft

_log = logging.getLogger(__name__)

WRITE_DEADLINE_S = 30.0
"""How long a rank may take to write its chunks of a span; then nobody knows what it writes, and the room is left."""


_LOOK_S = 0.001
_put_ids = itertools.count(1)
"""Of all savers: followers remember puts that came to nothing."""


class ShardedSaver(Saver):
    """Of rank 0. As `Saver`; `adapter` is this rank's own engine, which knows nothing of the others."""

    def __init__(
        self,
        *,
        adapter: EngineAdapter,
        store: ChunkStore,
        plan: StoragePlan | None,
        max_batch_tokens: int,
        counters: Counters,
        peers: Peers,
        save_wait: float = 0.1,
        num_threads: int = 2,
        scatter: Scatter | None = None,
        ring_batches: int = 2,
        is_worth_saving: Callable[[SpanId], bool] = lambda span_id: True,
        **settings: Any,
    ) -> None:
        """`settings`: more of `Saver`. Raises HCacheError when a rank is gone."""
        self._peers = peers
        self._puts: list[tuple[int, int, int]] = []
        """(uid, span_idx, put_id) of what is being put and the others do not know yet."""
        self._is_in_step = False
        share = Share(rank=0, num_ranks=peers.num_ranks)
        super().__init__(
            adapter=adapter,
            store=store,
            plan=plan,
            max_batch_tokens=max_batch_tokens,
            counters=counters,
            save_wait=save_wait,
            scatter=scatter,
            ring_batches=ring_batches,
            is_worth_saving=is_worth_saving,
            share=share,
            sink=ShardedFlusher(
                store=store, counters=counters, num_threads=num_threads, scatter=scatter, peers=peers, share=share
            ),
            **settings,
        )
        if plan is not None:
            peers.order(
                StartSaving(
                    plan=plan, max_batch_tokens=max_batch_tokens, save_wait=save_wait, ring_batches=ring_batches
                )
            )

    def open(self, uid: int, *, seed: bytes, token_ids: Sequence[int], left_out: Set[SpanId] = frozenset()) -> None:
        self._order(OpenSequence(uid=uid, num_tokens=len(token_ids)))
        super().open(uid, seed=seed, token_ids=token_ids, left_out=left_out)

    def truncate(self, uid: int, num_tokens: int) -> None:
        if uid in self._tracks:
            self._order(TruncateSequence(uid=uid, num_tokens=num_tokens))
        super().truncate(uid, num_tokens)

    def close(self, uid: int) -> None:
        if uid in self._tracks:
            self._order(CloseSequence(uid=uid))
        super().close(uid)

    def heal(self, uid: int, wait_s: float = HEAL_WAIT_S) -> bool:
        """As `Saver.heal`, and False as long as spans of the sequence are on their way: a rank may yet say that it has
        lost its rows, and then they must be read from the blocks."""
        track = self._tracks.get(uid)
        if track is None:
            return True
        deadline_s = time.monotonic() + wait_s
        is_last = False
        while super().heal(uid, max(0.0, deadline_s - time.monotonic())):
            if not self.is_pending(track.span_ids):
                if is_last or all(self._is_settled(track, span_idx) for span_idx in range(track.num_spans)):
                    return True
                is_last = True  # what was lost just now is read again, but not for ever from ranks that cannot write
            elif time.monotonic() >= deadline_s:
                return False
            else:
                time.sleep(_LOOK_S)
        return False

    def begin_step(self, segments: Sequence[StepSegment]) -> None:
        self._order(BeginStep(segments=tuple((segment.uid, len(segment.token_ids)) for segment in segments)))
        super().begin_step(segments)

    def abort_step(self) -> None:
        self._order(AbortStep())
        super().abort_step()

    def end_step(self) -> None:
        self._is_in_step = True
        try:
            super().end_step()
        finally:
            if self._is_in_step:  # nothing came to be submitted
                self._tell_step()

    def _submit(self, snapshot: Snapshot) -> None:
        """The others are told what to keep before anybody asks them for it."""
        if self._is_in_step:
            self._tell_step()
        puts, self._puts = self._puts, []
        for uid, span_idx, put_id in puts:
            self._order(HealSpan(uid=uid, span_idx=span_idx, put_id=put_id))
        super()._submit(snapshot)

    def _tell_step(self) -> None:
        self._is_in_step = False
        puts, self._puts = self._puts, []
        self._order(EndStep(puts=tuple(puts)))

    def _name_put(self, track: SequenceTrack, span_idx: int) -> int:
        put_id = next(_put_ids)
        self._puts.append((track.uid, span_idx, put_id))
        return put_id

    def _order(self, order: object) -> None:
        if self.plan is not None:
            self._peers.order(order)


class ShardedFlusher(Flusher):
    """Has all ranks write a span, each its chunks, and publishes it."""

    def __init__(
        self,
        *,
        store: ChunkStore,
        counters: Counters,
        num_threads: int,
        peers: Peers,
        share: Share,
        scatter: Scatter | None = None,
    ) -> None:
        """`num_threads` put spans; `share`: of rank 0."""
        self.num_ranks = peers.num_ranks
        self._peers = peers
        self._shares = [replace(share, rank=rank) for rank in range(peers.num_ranks)]
        self._write_deadline_s = WRITE_DEADLINE_S
        self._asked: set[int] = set()
        """Puts whose chunks the others were asked for; of all others they are told that nobody will ask."""
        super().__init__(store=store, counters=counters, num_threads=num_threads, scatter=scatter)

    def _hand_over(self, put: SpanPut, *, is_sound: bool) -> None:
        if not is_sound:
            self._drop(put)
        super()._hand_over(put, is_sound=is_sound)

    def _store_span(self, put: SpanPut) -> None:
        try:
            super()._store_span(put)
        finally:
            if put.put_id not in self._asked:
                self._drop(put)
            self._asked.discard(put.put_id)

    def _drop(self, put: SpanPut) -> None:
        for share in self._shares[1:]:
            if share.chunks(put.record.span_idx, put.record.layout):
                try:
                    self._peers.ask(share.rank, DropPart(put_id=put.put_id))
                except Exception as error:  # gone, and with it what it kept
                    _log.debug("rank %d cannot be told: %s", share.rank, error)

    def _put(self, put: SpanPut) -> bool:
        record = put.record
        if self._store.find(record.span_id) is not None:
            self._store.touch([record.span_id])
            return True
        draft = self._store.share_draft(record, self._shares[0].writer_of(record.span_idx, record.layout))
        if draft is None:
            return False
        try:
            return self._write(put, draft)
        except BaseException:  # somebody may still write
            draft.abandon()
            raise

    def _write(self, put: SpanPut, draft: SharedDraft) -> bool:
        """Ends the draft, unless it raises."""
        record, crcs = put.record, [0] * put.record.layout.num_chunks
        idxs = [share.chunks(record.span_idx, record.layout) for share in self._shares]
        self._asked.add(put.put_id)
        answers: dict[int, Future[object]] = {}
        for rank, own in enumerate(idxs):
            if rank and own:
                payloads = tuple(draft.payloads[idx] for idx in own)
                answers[rank] = self._peers.ask(rank, WritePart(put_id=put.put_id, payloads=payloads))
        error: OSError | None = None
        try:
            chunks = [as_bytes(rows) for rows in put.rows]
            _fill_in(crcs, idxs[0], draft.write(dict(zip(idxs[0], chunks, strict=True))))
            self._counters.add("shard_written_bytes_total", sum(chunk.nbytes for chunk in chunks))
        except OSError as raised:
            error = raised
        wait_for(answers.values(), timeout=self._write_deadline_s)
        for rank, answer in answers.items():
            if not answer.done():  # what it goes on with shall not hold up what comes after it
                self._peers.ask(rank, DropPart(put_id=put.put_id))
        replies = {rank: answer.result(timeout=0) for rank, answer in answers.items()}
        for rank, reply in replies.items():
            if isinstance(reply, Written):
                _fill_in(crcs, idxs[rank], reply.crcs)
            elif isinstance(reply, Failed):
                _log.warning("rank %d could not write its part of a span: %s", rank, reply.what)
                if reply.errno is not None:  # else it is no fault of the disk's
                    error = error or OSError(reply.errno, os.strerror(reply.errno))
        if error is None and all(isinstance(reply, Written) for reply in replies.values()):
            return draft.publish(crcs)
        self._counters.add("lost_parts_total", sum(not isinstance(reply, Written) for reply in replies.values()))
        draft.drop(error)
        return False


def _fill_in(crcs: list[int], idxs: Sequence[int], own: Sequence[int]) -> None:
    for idx, crc in zip(idxs, own, strict=True):
        crcs[idx] = crc
