"""Contexts that are kept whatever happens: neither evicted nor expired, also after a restart."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Protocol

from mii_hcache.core.identity import ID_BYTES, SpanId
from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.base import StoreStats
from mii_hcache.storage.database import Database
from mii_hcache.storage.records import SpanRecord

_APPLICATION_ID = 0x48435049  # "HCPI"
_VERSION = 1
_SCHEMA = "CREATE TABLE pin (tip BLOB PRIMARY KEY, chain BLOB NOT NULL)"


class PinningStore(Protocol):
    """What is asked of a store: `ChunkStore`, with pins that also count for spans that are not here yet."""

    def find(self, span_id: SpanId) -> SpanRecord | None: ...
    def pin_always(self, span_ids: Iterable[SpanId]) -> None: ...
    def unpin(self, span_ids: Iterable[SpanId]) -> None: ...
    def stats(self) -> StoreStats: ...


class Pins:
    """Pinned contexts by their last span, the *tip*; every span before it is kept with it. Any thread.

    What a context grows by after it was pinned is not pinned: pin its new tip, then undo the old one. Deleting spans
    overrides pins. Pins live in a database of their own: losing it costs the pins, never the state. It names every span
    of a context, so that those on a disk that is away are pinned before it is back.
    """

    def __init__(self, path: Path | None, store: PinningStore, flush: Callable[[], None]) -> None:
        """Pins what the database at `path` names; None remembers for this process's
        life. `store`: where pinned spans must stay (of tiers, the last one); `flush` returns when all that was accepted
        so far is there. Blocks on I/O."""
        self._store, self._flush = store, flush
        self._lock = threading.Lock()
        self._chains: dict[SpanId, list[SpanId]] = {}
        """By tip: what was pinned for it."""
        self._loaded: dict[SpanId, list[SpanId]] = {}
        self._database: Database | None = None
        self.note: str | None = None
        """A sentence for people when a damaged database was set aside."""
        if path is not None:
            self._database = Database(
                path, schema=_SCHEMA, application_id=_APPLICATION_ID, version=_VERSION, load=self._load
            )
            self.note = self._database.note
        is_whole = not store.stats().num_away  # asked before: what lies on a disk that is away may come back
        for tip, chain in self._loaded.items():
            if is_whole and store.find(tip) is None:
                self._write("DELETE FROM pin WHERE tip = ?", tip)  # its spans were deleted or damaged meanwhile
            else:
                store.pin_always(chain)
                self._chains[tip] = chain

    @property
    def tips(self) -> list[SpanId]:
        """Of all pinned contexts, in no order."""
        with self._lock:
            return list(self._chains)

    def pin(self, tip: SpanId) -> int:
        """Pin a context, durably when this returns. How many spans are kept for it; 0, and nothing pinned, when the tip
        is not saved. Pinning twice is pinning once. Blocks on I/O. Raises sqlite3.Error, having pinned nothing."""
        self._flush()
        with self._lock:
            if tip not in self._chains and self._pin(tip):
                try:
                    self._write("INSERT OR REPLACE INTO pin VALUES (?, ?)", tip, b"".join(self._chains[tip]))
                except BaseException:
                    self._store.unpin(self._chains.pop(tip))
                    raise
            return len(self._chains.get(tip, ()))

    def unpin(self, tip: SpanId) -> bool:
        """Undo `pin`; False when it was not pinned. Blocks on I/O. Raises sqlite3.Error, having changed nothing."""
        with self._lock:
            if tip not in self._chains:
                return False
            self._write("DELETE FROM pin WHERE tip = ?", tip)
            self._store.unpin(self._chains.pop(tip))
        return True

    def close(self) -> None:
        """Release the file; spans stay pinned in an open store. Idempotent."""
        if self._database is not None:
            self._database.close()

    def _pin(self, tip: SpanId) -> bool:
        chain: list[SpanId] = []
        seen: set[SpanId] = set()
        step: SpanId | None = tip
        while step is not None and step not in seen:
            record = self._store.find(step)
            if record is None:
                break
            seen.add(step)
            chain.append(step)
            step = record.parent_id
        if chain:
            self._store.pin_always(chain)
            self._chains[tip] = chain
        return bool(chain)

    def _write(self, statement: str, *values: bytes) -> None:
        def change(connection: sqlite3.Connection) -> None:
            connection.execute(statement, values)

        if self._database is not None:
            self._database.transact(change)

    def _load(self, connection: sqlite3.Connection) -> None:
        self._loaded = _chains_in(connection)


def read_tips(path: Path) -> list[SpanId]:
    """Tips of the pinned contexts in a database that nobody has open; none when there is no such file. Changes nothing:
    what a crash left in SQLite's log is read from a copy. Raises OSError, sqlite3.Error, CorruptChunkError."""
    if not path.exists():
        return []
    with tempfile.TemporaryDirectory(prefix="hcache-pins-") as folder:
        for file in path.parent.glob(path.name + "*"):
            shutil.copyfile(file, Path(folder) / file.name)
        with closing(sqlite3.connect(Path(folder) / path.name)) as connection:
            return list(_chains_in(connection))


def _chains_in(connection: sqlite3.Connection) -> dict[SpanId, list[SpanId]]:
    """By tip. Raises CorruptChunkError."""
    chains = {}
    for tip, chain in connection.execute("SELECT tip, chain FROM pin"):
        if not isinstance(tip, bytes) or len(tip) != ID_BYTES or not isinstance(chain, bytes) or len(chain) % ID_BYTES:
            raise CorruptChunkError("a pin is malformed")
        chains[tip] = [chain[start : start + ID_BYTES] for start in range(0, len(chain), ID_BYTES)]
    return chains
