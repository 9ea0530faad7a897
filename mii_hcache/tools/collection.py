"""What a state directory holds that nobody needs, and giving it back. What is planned and what is done are one list, so
that a dry run tells the truth."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mii_hcache.core.identity import SpanId
from mii_hcache.errors import ConfigError
from mii_hcache.storage.catalog import Catalog, SpanRow
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.format import BLOCK_BYTES, slot_sizes
from mii_hcache.storage.recency import FIRST_CLOCK_TICK, TICKS_PER_S, Recency
from mii_hcache.storage.state_dir import StateDir, sync_dir
from mii_hcache.storage.survey import OLD, UNFINISHED
from mii_hcache.storage.transcripts import Transcripts
from mii_hcache.tools.checkup import refuse_if_owned, refuse_namespace
from mii_hcache.tools.scratch import leftovers, sweep
from mii_hcache.tools.state_view import StateView, databases_in, look_at
from mii_hcache.tools.table import size

_UNBOUNDED_BYTES = 1 << 62


@dataclass(kw_only=True)
class Collection:
    """For one state directory: what goes, and once it has gone, what was gained."""

    view: StateView
    expired: list[SpanRow] = field(default_factory=list)
    """Not used for too long."""
    evicted: list[SpanRow] = field(default_factory=list)
    """Beyond the capacity: least recently used first."""
    files: list[tuple[Path, str]] = field(default_factory=list)
    """Files that nobody needs, and why."""
    notes: list[str] = field(default_factory=list)
    before_bytes: int = 0
    after_bytes: int | None = None
    """Of everything in the directory, on disk; None in a dry run."""

    @property
    def free_slot_bytes(self) -> int:
        """What free slots take before any span goes."""
        return sum(segment.unused_bytes for segment in self.view.segments)

    @property
    def gain_bytes(self) -> int:
        """What is to be gained, about, besides what the databases shrink."""
        spans = sum(sum(slot_sizes(row.record.layout)) for row in [*self.expired, *self.evicted])
        return spans + self.free_slot_bytes + sum(_disk_bytes(path) for path, _ in self.files)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "state_dir": str(self.view.path),
            "num_spans": len(self.view.rows),
            "expired_spans": len(self.expired),
            "evicted_spans": len(self.evicted),
            "free_slot_bytes": self.free_slot_bytes,
            "files": [{"name": str(path.relative_to(self.view.path)), "why": why} for path, why in self.files],
            "gain_bytes": self.gain_bytes,
            "before_bytes": self.before_bytes,
            "after_bytes": self.after_bytes,
            "notes": self.notes,
        }

    def to_lines(self) -> list[str]:
        """For people."""
        is_dry = self.after_bytes is None
        would = "would be " if is_dry else ""
        lines = [f"{self.view.path}: {len(self.view.rows):,} spans, {size(self.before_bytes)} on disk"]
        if self.expired:
            lines.append(f"  {len(self.expired):,} spans {would}deleted: not used for too long")
        if self.evicted:
            lines.append(f"  {len(self.evicted):,} spans {would}evicted: least recently used, beyond the capacity")
        if self.free_slot_bytes:
            lines.append(f"  {size(self.free_slot_bytes)} of free slots {would}given back to the disk")
        lines += [f"  {path.relative_to(self.view.path)} {would}removed: {why}" for path, why in self.files]
        lines += [f"  note  {note}" for note in self.notes]
        if self.after_bytes is None:
            return [*lines, f"about {size(self.gain_bytes)} would be gained; nothing was changed"]
        gained_bytes = self.before_bytes - self.after_bytes
        return [*lines, f"{size(max(0, gained_bytes))} gained; {size(self.after_bytes)} are left"]


def plan(
    directory: Path,
    *,
    capacity_bytes: int | None = None,
    max_idle_s: float | None = None,
    keep_old: bool = False,
    pinned: Set[SpanId] = frozenset(),
) -> Collection:
    """What would go; changes nothing. Spans that are `pinned` stay. Raises StateDirBusyError when a server has the
    directory, ConfigError when it is none, or is damaged: what is unreadable now would be given back with the rest, and
    `fsck` decides about that."""
    refuse_if_owned(directory)
    refuse_namespace(directory)
    view = look_at(directory)
    if "catalog.sqlite" in view.broken or view.num_lost_spans:
        raise ConfigError(f"{directory} is damaged ({view.problems[0]}); run `python -m mii_hcache fsck` first")
    collection = Collection(view=view, before_bytes=_all_bytes(directory))
    rows = view.rows
    if max_idle_s is not None:
        before = (time.time() - max_idle_s) * TICKS_PER_S
        idle = [row for row in rows if FIRST_CLOCK_TICK <= row.last_used < before]
        collection.expired = [row for row in idle if row.record.span_id not in pinned]
        num_unknown = sum(row.last_used < FIRST_CLOCK_TICK for row in rows)
        if num_unknown:
            collection.notes.append(f"when {num_unknown:,} spans were used last is not known; they stay")
    if capacity_bytes is not None:
        expired = {row.record.span_id for row in collection.expired}
        left = [row for row in rows if row.record.span_id not in expired]
        collection.evicted = _beyond(left, capacity_bytes, pinned)
    collection.files = [(file.path, file.why) for file in view.files if file.state in _unneeded(keep_old)]
    if not keep_old:
        aside = [path for path in databases_in(directory) if ".damaged-" in path.name]
        collection.files += [(path, "it was set aside as damaged") for path in aside]
    collection.notes += [f"{folder.name} was left by a program that was killed" for folder in leftovers(directory)]
    return collection


def collect(collection: Collection) -> None:
    """Do it. Blocks on I/O. Raises StateDirBusyError, ConfigError."""
    directory = collection.view.path
    with closing(StateDir(directory)) as state_dir:
        try:
            for folder in {path.parent for path, _ in collection.files}:
                for path in [path for path, _ in collection.files if path.parent == folder]:
                    path.unlink(missing_ok=True)
                sync_dir(folder)
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be removed ({error.strerror})") from error
        sweep(directory)
        if state_dir.catalog.exists():
            _shrink_segments(state_dir, [row.record.span_id for row in [*collection.expired, *collection.evicted]])
        try:
            _vacuum(state_dir, collection.view.broken)
        except sqlite3.Error as error:
            collection.notes.append(f"the databases could not be made smaller ({error})")
        if "transcripts.sqlite" in collection.view.broken:
            collection.notes.append("the transcripts are damaged; `python -m mii_hcache fsck --repair` forgets them")
    collection.after_bytes = _all_bytes(directory)


def _shrink_segments(state_dir: StateDir, doomed: Sequence[SpanId]) -> None:
    """Opening a store gives its free slots back; deleting spans gives back theirs, and empty files."""
    with closing(FileStore(state_dir, _UNBOUNDED_BYTES, io="threads", flush_interval_s=None)) as store:
        store.delete(doomed)
        store.flush()


def _vacuum(state_dir: StateDir, broken: set[str]) -> None:
    if state_dir.catalog.exists():
        with closing(Catalog(state_dir.catalog, state_dir.read_store_uuid())) as catalog:
            catalog.vacuum()
    if state_dir.transcripts.exists() and state_dir.transcripts.name not in broken:
        with closing(Transcripts(state_dir.transcripts, flush_interval_s=None)) as transcripts:
            transcripts.vacuum()


def _beyond(rows: Sequence[SpanRow], capacity_bytes: int, pinned: Set[SpanId]) -> list[SpanRow]:
    """What must go so that segment files fit, in the order in which a server would evict it."""
    by_id = {row.record.span_id: row for row in rows}
    order = Recency()
    order.load((row.record.span_id, row.record.parent_id, row.record.span_idx, row.last_used) for row in rows)
    order.pin(pinned)
    num_chunks = Counter(place.segment for row in rows for place in row.places)
    held_bytes = BLOCK_BYTES * len(num_chunks) + sum(sum(slot_sizes(row.record.layout)) for row in rows)
    gone = []
    for span_id in order.victims():
        if held_bytes <= capacity_bytes:
            break
        row = by_id[span_id]
        gone.append(row)
        held_bytes -= sum(slot_sizes(row.record.layout))
        num_chunks.subtract(place.segment for place in row.places)
        held_bytes -= BLOCK_BYTES * sum(not num_chunks[segment] for segment in {place.segment for place in row.places})
    return gone


def _unneeded(keep_old: bool) -> tuple[str, ...]:
    return (UNFINISHED,) if keep_old else (UNFINISHED, OLD)


def _disk_bytes(path: Path) -> int:
    return 512 * path.lstat().st_blocks if path.exists() else 0


def _all_bytes(directory: Path) -> int:
    return sum(_disk_bytes(path) for path in directory.rglob("*") if path.is_file())
