"""What is pinned in state directories that no server uses."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from mii_hcache.core.identity import SpanId
from mii_hcache.errors import ConfigError, CorruptChunkError
from mii_hcache.storage.pins import read_tips
from mii_hcache.storage.state_dir import PINS_FILE
from mii_hcache.storage.stripe_set import StripeSet
from mii_hcache.tools.state_view import look_at


def pinned_spans(directories: Sequence[Path]) -> frozenset[SpanId]:
    """Every span of every pinned context. Its pin may lie in one directory and its spans in all of a set, so all of
    them have to be given. Raises ConfigError."""
    stripes = StripeSet.of([directory.absolute() for directory in directories])
    if set(stripes.members) - {seat.ordinal for seat in stripes.seats}:
        raise ConfigError(f"what is pinned is not known without all directories of the set: {stripes.notes[-1]}")
    try:
        tips = [tip for directory in directories for tip in read_tips(directory / PINS_FILE)]
    except (OSError, sqlite3.Error, CorruptChunkError) as error:
        raise ConfigError(f"what is pinned cannot be read ({error}); run `python -m mii_hcache fsck` first") from error
    if not tips:
        return frozenset()
    parents = {row.record.span_id: row.record.parent_id for folder in directories for row in look_at(folder).rows}
    pinned: set[SpanId] = set()
    for tip in tips:
        step: SpanId | None = tip
        while step is not None and step in parents and step not in pinned:
            pinned.add(step)
            step = parents[step]
    return frozenset(pinned)
