"""One context on its way back: reads ahead of the engine thread, projections and forwards between engine steps.

Paper sections 3.1 and 4.1. Reader threads keep tiles in flight; the engine thread places what has arrived, and fills
tokens by a forward while nothing has. So both resources work whenever they can, in whatever order the bytes come.
Tokens count as present only after every layer of every span has arrived and been verified; damage cuts the restored
prefix at its span, and the rest is prefilled.

On a GPU placing and filling are launched, not done, when a call returns (`placing.py`): a restore is over when what
follows on the engine's own stream comes behind them, and its timeline is true when they are done (`is_settled`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.runtime.ports import KVTarget
from mii_hcache.runtime.streams import Event
from mii_hcache.runtime.tiles import TileRead
from mii_hcache.runtime.timeline import RestoreTimeline
from mii_hcache.runtime.work import Fill, plan_fills, plan_tiles
from mii_hcache.storage.records import SpanRecord

if TYPE_CHECKING:
    from mii_hcache.runtime.restorer import Restorer

MAX_FILLS_AHEAD = 2
"""Fills that a device may have before it: one that runs, and one for it to go on with. Others' steps queue behind."""
_LOOK_S = 0.05
"""How often who waits looks whether a read hangs."""
_DEVICE_LOOK_S = 0.0002
"""How often who waits for the device looks at it."""


@dataclass(kw_only=True)
class RestoreOutcome:
    """What a restore brought back."""

    num_tokens: int = 0
    """Tokens that are present now."""
    recomputed_tokens: int = 0
    """Of these, the leading ones that went through all layers."""
    kinds: list[str] = field(default_factory=list)
    """Ways in which layers came back: `hidden`, `kv`, `recompute` (more than layer 0's projection)."""
    tiers: list[str] = field(default_factory=list)
    cut_reason: str | None = None
    """`corrupt`, `missing`, `unavailable` or `stalled` when the prefix was cut short."""
    read_bytes: int = 0


class Restore:
    """One context being restored. Engine thread only: call `step` until it returns the outcome, or `cancel`."""

    def __init__(
        self,
        restorer: Restorer,
        target: KVTarget,
        records: Sequence[SpanRecord],
        token_ids: Sequence[int],
        *,
        recompute_tokens: int,
        recompute_layers: int,
    ) -> None:
        """See `Restorer.start`."""
        num_tokens = len(records) * SPAN_TOKENS
        if len(token_ids) < num_tokens:
            raise ValueError(f"{len(token_ids)} token ids for {len(records)} spans")
        if recompute_tokens % SPAN_TOKENS or not 0 <= recompute_tokens <= num_tokens:
            raise ValueError(f"cannot recompute the first {recompute_tokens} of {num_tokens} tokens")
        geometry = restorer.adapter.geometry
        layouts = [record.layout for record in records]
        self._restorer = restorer
        self._target = target
        self._token_ids = torch.tensor(token_ids[:num_tokens], dtype=torch.int64)
        self._num_spans = len(records)
        self._recompute_tokens = recompute_tokens
        self._fills: deque[Fill] = deque(
            plan_fills(
                layouts,
                num_layers=geometry.num_layers,
                recompute_tokens=recompute_tokens,
                recompute_layers=recompute_layers,
            )
        )
        self._is_recomputing = any(fill.num_layers > 1 for fill in self._fills)
        if self._is_recomputing and not restorer.adapter.max_fill_tokens:
            raise ValueError("this engine cannot recompute layers behind the first one")
        self._tiles = plan_tiles(
            layouts,
            recompute_tokens=recompute_tokens,
            recompute_layers=recompute_layers,
            tile_spans=restorer.pieces.tile_spans,
            # of several ranks' tiles each has its share: short ones are shorter still
            first_spans=restorer.pieces.first_spans if restorer.placer.gathering is None else None,
        )
        self._next_tile = next(self._tiles, None)
        self._reads: deque[TileRead] = deque()
        self._filling: deque[Event] = deque()
        self._records = list(records)
        self._span_ids = [record.span_id for record in records]
        self._saved_ids = [record.span_id for record in records if record.layout.num_chunks]
        """Without those of gaps: others may save and pin them meanwhile."""
        self._is_open = True
        store = restorer.store
        self._tiers = [store.tier_of(span_id) or store.name for span_id in self._span_ids]
        self.outcome = RestoreOutcome()
        self.timeline = RestoreTimeline()
        store.touch(self._saved_ids)
        store.pin(self._saved_ids)
        try:
            self._source = restorer.open_tiles(target, self._span_ids, self.timeline)
        except BaseException:
            store.unpin(self._saved_ids)
            raise
        restorer.num_open += 1

    @property
    def can_work(self) -> bool:
        """Whether `step` would find something to do without waiting."""
        if self._reads:
            return self._is_head_ready() or self._may_fill()
        return self._may_fill() or (self._next_tile is not None and self._may_read()) or self._is_all_launched()

    @property
    def is_settled(self) -> bool:
        """Whether the device has done all that this restore launched: its `timeline` is complete then. On a CPU always,
        on a GPU soon after the outcome. Does not block; ask now and then."""
        return self.timeline.settle()

    def _is_all_launched(self) -> bool:
        return not (self._reads or self._fills or self._next_tile is not None)

    def _may_read(self) -> bool:
        return len(self._reads) + self._source.num_held < self._restorer.tiles_ahead

    def read_ahead(self) -> None:
        """Start the reads that come next, as far as may be; `step` does so too. Does not block."""
        while self._next_tile is not None and self._may_read():
            tile, self._next_tile = self._next_tile, next(self._tiles, None)
            if tile.first_span < self._num_spans:
                self._reads.append(self._source.start(tile))

    def step(self, budget_s: float, *, wait: bool) -> RestoreOutcome | None:
        """Work for about `budget_s` (a piece at least, when one can be done). The outcome when done, else None.

        `wait` False returns at once when nothing can be done before a read ends, so that others may decode, and keeps
        pieces small; True waits for it, for what is left of `budget_s`.
        """
        if not self._is_open:
            raise RuntimeError("this restore is over")
        pieces = self._restorer.pieces
        started_s = time.perf_counter()
        left_s = budget_s
        try:
            while True:
                self.read_ahead()
                if self._reads and self._is_head_ready():
                    self._place_tile()
                elif self._may_fill():
                    self._fill(pieces.alone_fill_tokens if wait else pieces.shared_fill_tokens)
                elif self._is_all_launched():
                    self._finish()
                    return self.outcome
                elif not (wait and self._wait(left_s)):
                    return None
                left_s = budget_s - (time.perf_counter() - started_s)
                if left_s <= 0:
                    return None
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give buffers and pins back; the target holds nothing valid, and its blocks may be freed: whatever is launched
        on the engine's own stream from now on comes behind what was launched into them. Idempotent. Does not block: a
        buffer that is still read into, or copied from, is given back when that ends."""
        if not self._is_open:
            return
        self._is_open = False
        self._restorer.num_open -= 1
        try:
            self._source.join()
        finally:
            while self._reads:
                self._reads.popleft().release()
            self._restorer.store.unpin(self._saved_ids)

    def _finish(self) -> None:
        self.cancel()
        outcome = self.outcome
        if outcome.cut_reason == "corrupt":
            # What follows has not been read to the end and will be prefilled now: let it be saved anew.
            self._restorer.store.delete(self._span_ids[self._num_spans :])
        first = self._recompute_tokens // SPAN_TOKENS
        kept = self._records[first : self._num_spans]
        outcome.num_tokens = self._num_spans * SPAN_TOKENS
        outcome.recomputed_tokens = self._recompute_tokens
        kinds = {name for record in kept for name in record.layout.kind_names}
        outcome.kinds = sorted({*kinds, "recompute"} if self._is_recomputing else kinds)
        outcome.tiers = sorted(set(self._tiers[first : self._num_spans]))
        self._target.commit(outcome.num_tokens)
        self.timeline.finish()

    # --- reading ------------------------------------------------------------------------------------------------

    def _wait(self, left_s: float) -> bool:
        """Whether there came something to do in time."""
        started_s = time.perf_counter()
        stop_s = started_s + left_s
        while not self.can_work:
            now_s = time.perf_counter()
            if now_s >= stop_s:
                break
            is_device_behind = bool(self._fills) or (self._next_tile is not None and self._source.num_held > 0)
            look_s = min(stop_s - now_s, _DEVICE_LOOK_S if is_device_behind else _LOOK_S)
            if self._reads:
                wait_for([self._reads[0].outcome], timeout=min(look_s, self._restorer.read_deadline_s))
            else:
                time.sleep(look_s)
        self.timeline.add("wait", started_s)
        return self.can_work

    def _is_head_ready(self) -> bool:
        """Whether something can be done about the next tile: its read has ended, hangs, or is of no use any more."""
        read = self._reads[0]
        return read.outcome.done() or self._is_overdue(read) or read.tile.first_span >= self._num_spans

    def _is_overdue(self, read: TileRead) -> bool:
        return time.perf_counter() - read.started_s > self._restorer.read_deadline_s

    def _do_without(self, read: TileRead) -> None:
        """A read hangs, or lies behind a cut. What of its tile comes before the first span that cannot be read now is
        read again."""
        read.release()
        tile = read.tile
        if tile.first_span >= self._num_spans:
            return
        ids = self._span_ids[tile.first_span : tile.first_span + tile.num_spans]
        find = self._restorer.store.find
        num_there = next((idx for idx, span_id in enumerate(ids) if find(span_id) is None), 0)
        self._cut(tile.first_span + num_there, "stalled")
        if num_there:
            self._reads.appendleft(self._source.start(replace(tile, num_spans=num_there)))

    def _cut(self, num_spans: int, reason: str | None) -> None:
        """Nothing from there on comes back."""
        if num_spans < self._num_spans:
            self._num_spans = num_spans
            self.outcome.cut_reason = reason
            self._restorer.counters.add("restore_cuts_total")

    # --- the engine thread's work -------------------------------------------------------------------------------

    def _may_fill(self) -> bool:
        while self._filling and self._filling[0].is_done:
            self._filling.popleft()
        return bool(self._fills) and len(self._filling) < MAX_FILLS_AHEAD

    def _fill(self, most_tokens: int) -> None:
        fill = self._fills.popleft()
        stop = min(fill.stop, self._num_spans * SPAN_TOKENS)  # nothing behind a cut is of use
        if fill.num_layers > 1:
            most_tokens = min(most_tokens, self._restorer.adapter.max_fill_tokens)
        else:
            most_tokens = self._restorer.pieces.tile_spans * SPAN_TOKENS
        middle = min(stop, fill.start + most_tokens)
        if fill.start >= stop:
            return
        main = self._restorer.streams.main
        began = main.record(is_timed=True)
        self._target.fill(fill.start, self._token_ids[fill.start : middle], fill.num_layers)
        ended = main.record(is_timed=True)
        self._filling.append(ended)
        self.timeline.add_work(
            "fill", began, ended, num_layers=fill.num_layers, start=fill.start, num_tokens=middle - fill.start
        )
        if middle < stop:
            self._fills.appendleft(Fill(start=middle, stop=stop, num_layers=fill.num_layers))

    def _place_tile(self) -> None:
        """Finish the next tile, about which something can be done."""
        read = self._reads.popleft()
        if not read.outcome.done():
            self._do_without(read)
            return
        try:
            outcome = read.outcome.result()
            tile = read.tile
            if outcome.num_ok < tile.num_spans:
                self._cut(tile.first_span + outcome.num_ok, outcome.reason)
            num_spans = min(tile.num_spans, self._num_spans - tile.first_span)
            if num_spans > 0:
                read.place(num_spans)
                self.outcome.read_bytes += num_spans * self._restorer.adapter.geometry.chunk_bytes(tile.kind)
        finally:
            read.release()
