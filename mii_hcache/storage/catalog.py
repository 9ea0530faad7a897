"""What is durable in a file store: one row per span, in SQLite."""

from __future__ import annotations

import sqlite3
import struct
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from crc32c import crc32c

from mii_hcache.core.identity import ID_BYTES, SpanId
from mii_hcache.core.layout import SpanLayout
from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.database import MAX_COUNT, Database
from mii_hcache.storage.format import FORMAT_VERSION, UUID_BYTES, pack_kinds, parse_kinds
from mii_hcache.storage.records import SpanRecord
from mii_hcache.storage.slots import MAX_SEGMENT, MAX_SLOTS, Places, SlotSet
from mii_hcache.storage.state_dir import new_store_uuid

_APPLICATION_ID = 0x48434154  # "HCAT"
_SCHEMA = """
CREATE TABLE store (one INTEGER PRIMARY KEY CHECK (one = 1), uuid BLOB NOT NULL, generation INTEGER NOT NULL);
CREATE TABLE span (
    span_id BLOB PRIMARY KEY, parent_id BLOB, span_idx INTEGER NOT NULL, token_ids BLOB NOT NULL,
    kinds BLOB NOT NULL, hidden_chunk_bytes INTEGER NOT NULL, kv_chunk_bytes INTEGER NOT NULL,
    generation INTEGER NOT NULL, places BLOB NOT NULL, crc INTEGER NOT NULL, last_used INTEGER NOT NULL
)
"""
_COLUMNS = (
    "span_id, parent_id, span_idx, token_ids, kinds, hidden_chunk_bytes, kv_chunk_bytes, generation, places, crc, "
    "last_used"
)
_INSERT = "INSERT OR REPLACE INTO span VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_CHUNK = struct.Struct("<III")
_FIXED = struct.Struct("<10q")


@dataclass(frozen=True, kw_only=True)
class SpanRow:
    """A durable span: what it is and where its chunks lie."""

    record: SpanRecord
    generation: int
    places: Places
    crcs: Sequence[int]
    """CRC32C of each chunk's payload."""
    last_used: int
    """Tick of `Recency`: microseconds since 1970."""


class Catalog:
    """The rows of a file store. Opening checks every row and blocks on I/O; a catalog that fails is set aside.

    One caller at a time. `commit` blocks until its transaction is durable.
    """

    def __init__(self, path: Path, store_uuid: bytes | None) -> None:
        """`store_uuid`: of the store that the catalog must belong to; None adopts the catalog's, or makes one."""
        self.store_uuid = store_uuid or b""
        self.rows: list[SpanRow] = []
        """Rows as found at opening; the owner takes them over."""
        self._expected_uuid = store_uuid
        self._last_generation = 0
        self.is_new = not path.exists()
        """Whether there was no catalog to open."""
        self.has_undurable = True  # what a killed process left in SQLite's log may not be synced
        """Whether a power cut may still undo the last transactions: the next durable one makes them so."""
        self._database = Database(
            path, schema=_SCHEMA, application_id=_APPLICATION_ID, version=FORMAT_VERSION, load=self._load
        )
        self.note = self._database.note
        """A sentence for people when a damaged catalog was set aside."""
        self.aside = self._database.aside
        """Where it is now."""

    def first_generation(self) -> int:
        """A generation above all that this store ever used. The clock vouches for those that no row remembers (lost
        catalog, old copy restored): puts are slower than nanoseconds."""
        return max(self._last_generation + 1, time.time_ns())

    def commit(
        self,
        *,
        add: Iterable[SpanRow] = (),
        drop: Iterable[tuple[SpanId, int]] = (),
        used: Iterable[tuple[SpanId, int]] = (),
        durable: bool = True,
    ) -> None:
        """One transaction: delete rows `(span_id, generation)`, insert rows, set `(span_id, last_used)`.

        Raises sqlite3.Error, having changed nothing. `durable` False: see `Database.transact`.
        """
        added = list(add)
        is_late = durable and self.has_undurable

        def change(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM span WHERE span_id = ? AND generation = ?", drop)
            connection.executemany(_INSERT, [_pack(row) for row in added])
            connection.executemany(
                "UPDATE span SET last_used = ? WHERE span_id = ?", ((tick, span_id) for span_id, tick in used)
            )
            if added:
                last = max(row.generation for row in added)
                connection.execute("UPDATE store SET generation = max(generation, ?)", (last,))
            elif is_late:  # SQLite syncs its log only when a page changed
                connection.execute("UPDATE store SET generation = generation + 1")

        self._database.transact(change, durable=durable)
        self.has_undurable = not durable

    def vacuum(self) -> None:
        """See `Database.vacuum`."""
        self._database.vacuum()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._database.close()

    def _load(self, connection: sqlite3.Connection) -> None:
        found = connection.execute("SELECT uuid, generation FROM store").fetchone()
        if found is None:
            self.store_uuid = self._expected_uuid or new_store_uuid()
            if connection.execute("SELECT 1 FROM span").fetchone() is not None:
                raise CorruptChunkError("it has rows but no identity")
            connection.execute("INSERT INTO store VALUES (1, ?, 0)", (self.store_uuid,))
            return
        store_uuid, generation = found
        if not isinstance(store_uuid, bytes) or len(store_uuid) != UUID_BYTES or not _is_count(generation):
            raise CorruptChunkError("its identity is malformed")
        if self._expected_uuid not in (None, store_uuid):
            raise CorruptChunkError("it belongs to another store")
        rows = [_parse(values) for values in connection.execute("SELECT * FROM span")]
        _check_places(rows)
        self.store_uuid = store_uuid
        self.rows = rows
        self._last_generation = max([generation, *(row.generation for row in rows)])


def salvage(path: Path) -> list[SpanRow]:
    """Those rows of a catalog that was set aside which are sound, each by its own checksum, as far as SQLite can read
    them. What they say was true once; whether it still is, the slots' headers tell. Blocks on I/O; does not raise."""
    rows: dict[SpanId, SpanRow] = {}
    with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as connection:
        connection.text_factory = bytes
        if connection.execute("PRAGMA user_version").fetchone()[0] != FORMAT_VERSION:
            return []
        for values in connection.execute(f"SELECT {_COLUMNS} FROM span"):
            with suppress(CorruptChunkError):
                row = _parse(values)
                known = rows.get(row.record.span_id)
                if known is None or known.generation < row.generation:
                    rows[row.record.span_id] = row
    return list(rows.values())


def _pack(row: SpanRow) -> tuple[object, ...]:
    record = row.record
    chunks = b"".join(_CHUNK.pack(*place, crc) for place, crc in zip(row.places, row.crcs, strict=True))
    values = (
        record.span_id,
        record.parent_id,
        record.span_idx,
        record.token_ids,
        pack_kinds(record.layout.kinds, record.layout.kv_shards),
        record.layout.hidden_chunk_bytes,
        record.layout.kv_chunk_bytes,
        row.generation,
        chunks,
    )
    return (*values, _row_crc(values), row.last_used)


def _parse(values: tuple[Any, ...]) -> SpanRow:
    """Inverse of `_pack`. Raises CorruptChunkError."""
    *fields, crc, last_used = values
    try:
        if _row_crc(fields) != crc or not isinstance(last_used, int):
            raise CorruptChunkError("a row has a wrong checksum")
        span_id, parent_id, span_idx, token_ids, kinds, hidden_chunk_bytes, kv_chunk_bytes, generation, chunks = fields
        record = SpanRecord(
            span_id=span_id,
            parent_id=parent_id,
            span_idx=span_idx,
            token_ids=token_ids,
            layout=_layout(kinds, hidden_chunk_bytes, kv_chunk_bytes),
        )
        triples = list(_CHUNK.iter_unpack(chunks))
    except (TypeError, ValueError, struct.error) as error:
        raise CorruptChunkError(f"a row is malformed ({error})") from error
    if not all(map(_is_count, (span_idx, generation, last_used))):
        raise CorruptChunkError("a row has impossible numbers")
    if len(span_id) != ID_BYTES or not triples or len(triples) != record.layout.num_chunks:
        raise CorruptChunkError("a row has impossible sizes")
    return SpanRow(
        record=record,
        generation=generation,
        places=Places((segment, slot) for segment, slot, _ in triples),
        crcs=array("I", (crc for _, _, crc in triples)),
        last_used=last_used,
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= MAX_COUNT


@lru_cache(maxsize=1024)
def _layout(kinds: bytes, hidden_chunk_bytes: int, kv_chunk_bytes: int) -> SpanLayout:
    parsed, kv_shards = parse_kinds(kinds)
    return SpanLayout.shared(parsed, hidden_chunk_bytes, kv_chunk_bytes, kv_shards)


def _row_crc(fields: Sequence[Any]) -> int:
    """Over everything in a row but `last_used`, which changes alone."""
    span_id, parent_id, span_idx, token_ids, kinds, hidden_chunk_bytes, kv_chunk_bytes, generation, chunks = fields
    parent = b"" if parent_id is None else parent_id
    numbers = (span_idx, hidden_chunk_bytes, kv_chunk_bytes, generation, parent_id is None)
    sizes = (len(span_id), len(parent), len(token_ids), len(kinds), len(chunks))
    return crc32c(b"".join((_FIXED.pack(*numbers, *sizes), span_id, parent, token_ids, kinds, chunks)))


def _check_places(rows: Iterable[SpanRow]) -> None:
    """No two chunks may claim one slot. Raises CorruptChunkError."""
    claimed: dict[int, SlotSet] = {}
    for row in rows:
        for run in row.places.runs():
            if run.stop > MAX_SLOTS or run.segment > MAX_SEGMENT:
                raise CorruptChunkError(f"a chunk claims slot {run.stop - 1} of segment {run.segment}")
            if not claimed.setdefault(run.segment, SlotSet()).add(run.start, run.stop):
                raise CorruptChunkError("two chunks claim the same slot")
