"""On which path of a striped store a span is put. Policy: nothing on disk says so, and reads look everywhere.

It follows from the span alone: spans are put by several threads and overtake each other, and a path may be missing when
one comes. What comes after it lies where it would lie anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from mii_hcache.storage.directions import Writer
from mii_hcache.storage.records import SpanRecord


def turns_of(record: SpanRecord, num_paths: int, writer: Writer | None = None) -> list[int]:
    """All paths, the one whose turn it is first, then those that the span is handed on to.

    Consecutive spans of a context lie on consecutive paths, and where the first one lies is drawn from its id, so that
    short contexts spread, too. Spans that have a `Writer` lie on its own paths, those of `cycle_of`, in turn. What a
    path hands on is spread over the others.
    """
    own = range(num_paths) if writer is None else cycle_of(writer, num_paths)
    step = record.span_idx if writer is None else record.span_idx // writer.num_writers
    num_cycles, start = divmod(_drawn(record) + step, len(own))
    first, *rest = _rotated(own, start)
    others = [idx for idx in range(num_paths) if idx not in own]
    return list(dict.fromkeys([first, *_rotated(rest, num_cycles), *_rotated(others, num_cycles)]))


def _drawn(record: SpanRecord) -> int:
    """Where the context begins; of a span whose context nobody knows, a place of its own."""
    root_id = record.span_id if record.root_id is None else record.root_id
    return int.from_bytes(root_id[:8], "little")


def _rotated(paths: Sequence[int], steps: int) -> list[int]:
    start = steps % len(paths) if paths else 0
    return [*paths[start:], *paths[:start]]


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
