"""On which path of a striped store a span is put. Policy: nothing on disk says so, and reads look everywhere."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from mii_hcache.core.identity import SpanId
from mii_hcache.storage.directions import Writer
from mii_hcache.storage.records import SpanRecord

_MAX_TURNS = 65_536
"""Spans whose turn is remembered for the sake of the next ones of their contexts."""


@dataclass(frozen=True, slots=True)
class _Turn:
    path_idx: int
    phase: int
    """Where in the cycles of its writers the context began."""


class Turns:
    """Whose turn it is. Any thread; does not block.

    Consecutive spans of a context lie on consecutive paths, and where the first one lies is drawn from its id, so that
    short contexts spread, too. Spans that have a `Writer` lie on its own paths, those of `cycle_of`, in turn.
    """

    def __init__(self, num_paths: int) -> None:
        self._num_paths = num_paths
        self._lock = threading.Lock()
        """Guards what follows."""
        self._turns: OrderedDict[SpanId, _Turn] = OrderedDict()

    def of(self, record: SpanRecord, writer: Writer | None, path_of: Callable[[SpanId], int | None]) -> list[int]:
        """All paths, the one whose turn it is first, then those that the span is handed on to. `path_of`: on which path
        a span lies that nobody remembers, None: on none."""
        parent, drawn = self._parent_of(record), _drawn(record)
        if writer is None:
            before = None if parent is None else parent.path_idx
            if before is None and record.parent_id is not None:
                before = path_of(record.parent_id)
            firsts = [(drawn if before is None else before + 1) % self._num_paths]
        else:
            cycle = cycle_of(writer, self._num_paths)
            phase = drawn if parent is None else parent.phase
            start = (record.span_idx // writer.num_writers + phase) % len(cycle)
            firsts = [*cycle[start:], *cycle[:start]]
        others = [(firsts[0] + step) % self._num_paths for step in range(self._num_paths)]
        return list(dict.fromkeys([*firsts, *others]))

    def take(self, record: SpanRecord, path_idx: int) -> None:
        """The span is put there now."""
        parent = self._parent_of(record)
        turn = _Turn(path_idx, _drawn(record) if parent is None else parent.phase)
        with self._lock:
            self._turns[record.span_id] = turn
            self._turns.move_to_end(record.span_id)
            if len(self._turns) > _MAX_TURNS:
                self._turns.popitem(last=False)

    def _parent_of(self, record: SpanRecord) -> _Turn | None:
        if record.parent_id is None:
            return None
        with self._lock:
            return self._turns.get(record.parent_id)


def _drawn(record: SpanRecord) -> int:
    return int.from_bytes(record.span_id[:8], "little")


@lru_cache(maxsize=1024)
def cycle_of(writer: Writer, num_paths: int) -> tuple[int, ...]:
    """The paths that one of N writers takes in turn, for its first span, its second, and so on.

    Writer r has the paths r, r + N, r + 2N, ... for itself, as long as there are N of them to be dealt out. Those that
    are left over (all, where there are fewer paths than writers) are cut into equal parts, one for each writer in
    order: a writer has one or two of them, and shares them with as few others as can be. All paths get as much as each
    other, and all writers use as many bytes of all of them together."""
    num_writers = writer.num_writers
    num_left = num_paths % num_writers
    num_own = num_paths - num_left
    own = range(writer.idx, num_own, num_writers)
    if not num_left:
        return tuple(own)
    num_parts = math.lcm(num_writers, num_left)
    parts = range(writer.idx * num_parts // num_writers, (writer.idx + 1) * num_parts // num_writers)
    left = [num_own + part * num_left // num_parts for part in parts]
    return tuple([*own] * (num_parts // num_left) + left)
