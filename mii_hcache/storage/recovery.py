"""What of a catalog is still true for the segment files that are there."""

from __future__ import annotations

import logging
import sqlite3

from mii_hcache.errors import ConfigError
from mii_hcache.storage.catalog import Catalog, SpanRow
from mii_hcache.storage.format import slot_sizes
from mii_hcache.storage.segment_space import Segment
from mii_hcache.storage.segments import Segments
from mii_hcache.storage.slots import Run, SlotPool, SlotSet

_log = logging.getLogger(__name__)


def recover(catalog: Catalog, segments: Segments, pool: SlotPool) -> tuple[list[SpanRow], list[str]]:
    """Tell the pool about all segments and return the rows whose slots exist, with sentences for people about others.

    Rows of slots that are gone are deleted from the catalog. Takes the catalog's rows over. Blocks on I/O. Raises
    ConfigError when the catalog cannot be written.
    """
    files = segments.files
    pool.reserve_number(segments.last_number)
    taken = {number: SlotSet() for number in files}
    kept: list[SpanRow] = []
    lost: list[SpanRow] = []
    for row in catalog.rows:
        runs = row.places.runs()
        pool.reserve_number(max(run.segment for run in runs))
        if _has_slots(row, runs, files):
            kept.append(row)
            for run in runs:
                taken[run.segment].add(run.start, run.stop)
        else:
            lost.append(row)
    for number, file in files.items():
        pool.add_segment(number, file.header.slot_bytes, file.header.num_slots, taken[number], file.num_written)
    catalog.rows = []
    notes = [note for note in (catalog.note, *segments.notes) if note is not None]
    if catalog.is_new and files:
        notes.append("the catalog was missing: what was saved is forgotten, a new one started empty")
        _log.warning("%s", notes[-1])
    if lost:
        notes.append(f"{len(lost)} saved spans lie in segment files that are gone; they were forgotten")
        _log.warning("%s", notes[-1])
        try:
            catalog.commit(drop=[(row.record.span_id, row.generation) for row in lost])
        except sqlite3.Error as error:  # their slots would be reused under them
            raise ConfigError(
                f"the catalog cannot be written ({error}); make room, or choose another state_dir"
            ) from error
    return kept, notes


def _has_slots(row: SpanRow, runs: list[Run], files: dict[int, Segment]) -> bool:
    """Whether every chunk of a row has a slot of its size in a file that is there."""
    sizes, chunk_idx = slot_sizes(row.record.layout), 0
    for run in runs:
        num = run.stop - run.start
        header = files[run.segment].header if run.segment in files else None
        if header is None or run.stop > header.num_slots:
            return False
        if sizes[chunk_idx : chunk_idx + num].count(header.slot_bytes) != num:
            return False
        chunk_idx += num
    return True
