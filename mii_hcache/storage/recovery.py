"""What of a catalog is still true for the segment files that are there."""

from __future__ import annotations

import logging
import sqlite3

from mii_hcache.errors import ConfigError
from mii_hcache.storage.catalog import Catalog, SpanRow
from mii_hcache.storage.format import slot_bytes
from mii_hcache.storage.segments import Segments
from mii_hcache.storage.slots import SlotPool, SlotSet

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
        size, runs = slot_bytes(row.record.chunk_bytes), row.places.runs()
        pool.reserve_number(max(run.segment for run in runs))
        headers = [files[run.segment].header if run.segment in files else None for run in runs]
        if all(
            header is not None and header.slot_bytes == size and run.stop <= header.num_slots
            for run, header in zip(runs, headers, strict=True)
        ):
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
