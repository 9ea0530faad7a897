"""Saved state on a rank that follows: it saves and reads its share as rank 0 says, and decides nothing."""

from __future__ import annotations

import logging

import torch

from mii_hcache.runtime.following_saver import NUM_WRITERS, FollowingSaver
from mii_hcache.runtime.following_tiles import FollowingTiles
from mii_hcache.runtime.gathering import Gathering
from mii_hcache.runtime.parts import PartsSink, Reply
from mii_hcache.runtime.peers import (
    AbortStep,
    BeginStep,
    CloseSequence,
    Counted,
    DropPart,
    EndStep,
    Failed,
    ForgetPart,
    GatherRows,
    GatherRubbish,
    HealSpan,
    JoinRestore,
    OpenRestore,
    OpenSequence,
    PlaceRubbish,
    PlaceTile,
    ReadPart,
    StartSaving,
    TruncateSequence,
    WritePart,
)
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.share import Share
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Streams
from mii_hcache.storage.slot_files import SlotFiles

_log = logging.getLogger(__name__)


class FollowingState:
    """All of it: orders go to `obey`, on the engine thread, questions to `answer`, on any."""

    def __init__(
        self,
        *,
        adapter: EngineAdapter,
        share: Share,
        gather: GatherRows,
        files: SlotFiles,
        counters: Counters,
        streams: Streams | None = None,
    ) -> None:
        """`adapter`: this rank's engine, whose `QkvInputTap` this is. Takes `files` over. `streams`: where tiles are
        placed, None for the device's."""
        self._adapter = adapter
        self._share = share
        self._files = files
        self.counters = counters
        self.parts = PartsSink(counters=counters, files=files, num_threads=NUM_WRITERS)
        """Before there is a saver: rank 0 may ask for a put before this rank has heard that saving began."""
        self.saver: FollowingSaver | None = None
        self.tiles = FollowingTiles(
            adapter=adapter,
            gathering=Gathering(share=share, gather=gather),
            files=files,
            counters=counters,
            streams=streams,
        )

    def rows_for(self, layer_idx: int, num_tokens: int) -> torch.Tensor | None:
        """See `QkvInputTap`."""
        return None if self.saver is None else self.saver.rows_for(layer_idx, num_tokens)

    def tap(self, layer_idx: int, hidden: torch.Tensor) -> None:
        """See `QkvInputTap`."""
        if self.saver is not None:
            self.saver.tap(layer_idx, hidden)

    def obey(self, order: object) -> None:
        """Carry an order out. Raises what it raises: then this rank is not what rank 0 takes it for."""
        self.tiles.collect()
        if isinstance(order, StartSaving):
            self.saver = FollowingSaver(
                adapter=self._adapter, share=self._share, start=order, parts=self.parts, counters=self.counters
            )
        elif isinstance(order, PlaceTile):
            self.tiles.place(order)
        elif isinstance(order, OpenRestore):
            self.tiles.open(order)
        elif isinstance(order, JoinRestore):
            self.tiles.join(order)
        elif isinstance(order, PlaceRubbish):
            self.tiles.place_rubbish(order)
        elif isinstance(order, GatherRubbish):
            self.tiles.gather_rubbish(order)
        else:
            self._obey_saving(order)

    def _obey_saving(self, order: object) -> None:
        saver = self.saver
        if saver is None:
            raise RuntimeError(f"{order!r} before saving began")
        if isinstance(order, OpenSequence):
            saver.open_sequence(order)
        elif isinstance(order, TruncateSequence):
            saver.truncate(order.uid, order.num_tokens)
        elif isinstance(order, CloseSequence):
            saver.close(order.uid)
        elif isinstance(order, BeginStep):
            saver.begin(order)
        elif isinstance(order, EndStep):
            saver.end(order)
        elif isinstance(order, AbortStep):
            saver.abort_step()
        elif isinstance(order, HealSpan):
            saver.heal_one(order)
        else:
            raise RuntimeError(f"an order that nobody knows: {order!r}")

    def answer(self, question: object, reply: Reply) -> None:
        """`reply` is called once, on any thread. Does not block for long, and does not raise: what cannot be done is
        `Failed`, as nobody would answer any question after it."""
        try:
            self._answer(question, reply)
        except Exception as error:
            _log.exception("a question could not be taken up")
            reply(Failed(what=f"{type(error).__name__}: {error}"))

    def _answer(self, question: object, reply: Reply) -> None:
        """What it raises, it raises before it replies."""
        if isinstance(question, ReadPart):
            self.tiles.read(question, reply)
        elif isinstance(question, WritePart):
            self.parts.ask(question, reply)
        elif isinstance(question, ForgetPart):
            self.tiles.forget(question.read_id)
            reply(None)
        elif isinstance(question, DropPart):
            self.parts.drop(question.put_id)
            reply(None)
        elif isinstance(question, Counted):
            reply(self.counters.snapshot())
        else:
            raise RuntimeError(f"a question that nobody knows: {question!r}")

    def stop(self) -> None:
        """The end: what nobody asked for is not written."""
        self.parts.stop()
        self.tiles.stop()
        self._files.close()
