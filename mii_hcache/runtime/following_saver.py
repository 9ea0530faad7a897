"""Saving on a rank that follows: it captures its share of each step, and keeps of it what rank 0 says."""

from __future__ import annotations

from mii_hcache.core.layout import SpanLayout
from mii_hcache.runtime.parts import PartsSink
from mii_hcache.runtime.peers import BeginStep, EndStep, HealSpan, OpenSequence, StartSaving
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.share import Share
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.track import SequenceTrack

NUM_WRITERS = 2


class FollowingSaver(Saver):
    """Captures this rank's share of what runs, and keeps what rank 0 puts. Engine thread only.

    It knows lengths and no tokens, so the names of its spans mean nothing.
    """

    def __init__(
        self, *, adapter: EngineAdapter, share: Share, start: StartSaving, parts: PartsSink, counters: Counters
    ) -> None:
        """`parts`: where rank 0 asks for what is kept; the caller's to stop."""
        self._parts = parts
        self._wanted: dict[tuple[int, int], int] = {}
        """(uid, span_idx) to put_id, of what is being put."""
        self._taken: set[int] = set()
        super().__init__(
            adapter=adapter,
            store=None,
            plan=start.plan,
            max_batch_tokens=start.max_batch_tokens,
            counters=counters,
            save_wait=start.save_wait,
            ring_batches=start.ring_batches,
            share=share,
            sink=parts,
        )
        self._geometry = adapter.geometry

    def open_sequence(self, order: OpenSequence) -> None:
        self.open(order.uid, seed=b"", token_ids=[0] * order.num_tokens)

    def begin(self, order: BeginStep) -> None:
        self.begin_step([StepSegment(uid=uid, token_ids=[0] * num_tokens) for uid, num_tokens in order.segments])

    def end(self, order: EndStep) -> None:
        """What is not named is not kept."""
        assert self.plan is not None
        for uid, span_idx, put_id in order.puts:
            layout = SpanLayout.of(self._geometry, self.plan.kinds_of(span_idx), self._share.num_ranks)
            if self._share.chunks(span_idx, layout):
                self._wanted[uid, span_idx] = put_id
        self.end_step()
        self._lose_rest()

    def heal_one(self, order: HealSpan) -> None:
        """Rank 0 had a buffer for it; so has this rank, unless it is late, and then the span is not healed."""
        self._wanted[order.uid, order.span_idx] = order.put_id
        track = self._tracks.get(order.uid)
        if track is not None:
            self._healer.heal_span(track, order.span_idx, 0.0)
        self._lose_rest()

    def _lose_rest(self) -> None:
        """Puts whose rows this rank has not got."""
        lost = set(self._wanted.values()) - self._taken
        self._wanted.clear()
        self._taken.clear()
        self._parts.lose(lost)

    def _is_settled(self, track: SequenceTrack, span_idx: int) -> bool:
        return (track.uid, span_idx) not in self._wanted

    def _name_put(self, track: SequenceTrack, span_idx: int) -> int:
        put_id = self._wanted[track.uid, span_idx]
        self._taken.add(put_id)
        return put_id
