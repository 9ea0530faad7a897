"""A follower's chunks of spans that are being put: kept until rank 0 asks for them, or says that it will not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.flusher import Flusher
from mii_hcache.runtime.peers import Failed, PartLost, WritePart, Written
from mii_hcache.runtime.scatter import Scatter
from mii_hcache.runtime.snapshot import SpanPut
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.slot_files import SlotFiles
from mii_hcache.storage.workers import Workers

_log = logging.getLogger(__name__)

Reply = Callable[[object], None]
"""Sends the answer to a question, once."""


class PartsSink(Flusher):
    """Of a follower: nothing goes to a store. Rows are copied in the order of the steps, as everywhere; then they wait.

    Of every put that concerns this rank, rank 0 asks for the chunks or drops them, before or after they are there, and
    every put's chunks come to be there or are lost: so nothing is kept for ever. `ask`, `drop` and `lose` are for any
    thread.
    """

    def __init__(
        self, *, counters: Counters, files: SlotFiles, num_threads: int, scatter: Scatter | None = None
    ) -> None:
        """`num_threads` write."""
        super().__init__(store=None, counters=counters, num_threads=0, scatter=scatter)
        self._files = files
        self._writers = Workers(num_threads, "hcache-part")
        self._lock = threading.Lock()
        """Guards what follows, by put_id."""
        self._kept: dict[int, SpanPut] = {}
        self._asked: dict[int, tuple[WritePart, Reply]] = {}
        self._writing: dict[int, Future[None]] = {}
        self._lost: set[int] = set()
        self._dropped: set[int] = set()
        self._is_stopping = False

    @property
    def num_kept(self) -> int:
        """Puts whose chunks wait here."""
        return len(self._kept)

    def ask(self, question: WritePart, reply: Reply) -> None:
        """Write a put's chunks when they are there; `reply` says how it went, on any thread."""
        with self._lock:
            put = self._kept.pop(question.put_id, None)
            if put is not None:
                self._write_later(put, question, reply)
                return
            if question.put_id not in self._lost:
                self._asked[question.put_id] = question, reply
                return
            self._lost.discard(question.put_id)
        reply(PartLost())

    def drop(self, put_id: int) -> None:
        """Nobody will ask for a put's chunks, or nobody waits any more for what was asked: a write that hangs goes on,
        and holds up no other."""
        with self._lock:
            put = self._kept.pop(put_id, None)
            writing = self._writing.get(put_id)
            if put is None and writing is None and put_id not in self._lost:
                self._dropped.add(put_id)
            self._lost.discard(put_id)
        if writing is not None:
            self._writers.replace(writing)
        if put is not None:
            self._finish(put)

    def lose(self, put_ids: Iterable[int]) -> None:
        """These puts' chunks will never be there."""
        for put_id in put_ids:
            self._counters.add("lost_parts_total")
            with self._lock:
                asked = self._asked.pop(put_id, None)
                if asked is None and put_id not in self._dropped:
                    self._lost.add(put_id)
                self._dropped.discard(put_id)
            if asked is not None:
                asked[1](PartLost())

    def stop(self) -> None:
        """What was asked for is written; what was not is let go of."""
        with self._lock:
            self._is_stopping = True
            kept, self._kept = self._kept, {}
        for put in kept.values():
            self._finish(put)
        super().stop()
        self._writers.close(10.0)

    def _hand_over(self, put: SpanPut, *, is_sound: bool) -> None:
        if not is_sound:
            self._finish(put)
            self.lose([put.put_id])
            return
        with self._lock:
            asked = self._asked.pop(put.put_id, None)
            is_dropped = put.put_id in self._dropped
            self._dropped.discard(put.put_id)
            if asked is not None:
                self._write_later(put, *asked)
                return
            if not is_dropped and not self._is_stopping:
                self._kept[put.put_id] = put
                return
        self._finish(put)

    def _write_later(self, put: SpanPut, question: WritePart, reply: Reply) -> None:
        """Lock held: at no moment is a put neither kept nor being written, or who drops it would not find it."""
        self._writing[put.put_id] = self._writers.submit(lambda: reply(self._write(put, question)))

    def _write(self, put: SpanPut, question: WritePart) -> object:
        """The memory is given back before rank 0 hears of it: it bounds what is under way by its own."""
        try:
            chunks = [as_bytes(rows) for rows in put.rows]
            crcs = self._files.write(question.payloads, chunks)
            self._counters.add("shard_written_bytes_total", sum(chunk.nbytes for chunk in chunks))
            return Written(crcs=tuple(crcs))
        except Exception as error:
            _log.exception("this rank's part of a span could not be written")
            return Failed(what=str(error), errno=getattr(error, "errno", None))
        finally:
            with self._lock:
                del self._writing[put.put_id]
            self._finish(put)
