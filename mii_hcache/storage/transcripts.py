"""Which token ids a text was generated as: text that is sent again does not tokenize to the ids that were generated."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mii_hcache.core.identity import pack_tokens, unpack_tokens
from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.database import MAX_COUNT, Database
from mii_hcache.storage.pulse import Pulse
from mii_hcache.storage.recency import Recency
from mii_hcache.storage.rolling import RollingText
from mii_hcache.storage.trouble import Trouble

_log = logging.getLogger(__name__)

_APPLICATION_ID = 0x48435458  # "HCTX"
_VERSION = 1
_SCHEMA = """
CREATE TABLE transcript (
    key BLOB PRIMARY KEY, anchor BLOB NOT NULL, num_chars INTEGER NOT NULL, parent BLOB, num_kept INTEGER NOT NULL,
    delta BLOB NOT NULL, seal BLOB NOT NULL, last_used INTEGER NOT NULL
)
"""
_INSERT = "INSERT OR REPLACE INTO transcript VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_ROW_BYTES = 256
"""What a row weighs apart from its ids, about."""
_TICKS_INTERVAL_S = 30.0
_TYPES = (bytes, bytes, int, bytes, int, bytes, bytes, int)
_K = TypeVar("_K", bytes, int)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A remembered text. Its ids: the parent's first `num_kept`, then `delta`."""

    key: bytes
    """Hash of tenant and text."""
    anchor: bytes
    """Hash of tenant and as much of the text as is whole steps of `RollingText`."""
    num_chars: int
    parent: bytes | None
    """Key of a remembered text that this one begins with."""
    num_kept: int
    delta: bytes
    """Packed token ids."""
    seal: bytes
    """Hash of key and ids: whatever is damaged on the way to the ids, it shows here."""

    @property
    def num_bytes(self) -> int:
        return _ROW_BYTES + len(self.delta)


class Transcripts:
    """A bounded map from rendered text, up to the end of an answer, to its token ids. Per tenant: no tenant's text can
    be asked about by another. Texts are not stored, only their hashes; ids are, each only once per chain of turns.

    Any thread. `remember` and `longest_prefix` compute but do not block on I/O; what was remembered is durable after
    `flush`, or about `flush_interval_s` later. Texts that were not used for longest go first, later turns before
    earlier ones. Damage is a miss.
    """

    def __init__(
        self, path: Path | None, *, capacity_bytes: int = 128 << 20, flush_interval_s: float | None = 0.2
    ) -> None:
        """Opens or makes the database at `path` (blocks on I/O); None remembers for this process's life. All rows are
        held in memory, `capacity_bytes` of them. `flush_interval_s` None leaves saving to `flush`."""
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._rows: dict[bytes, _Row] = {}
        self._lengths: dict[bytes, dict[int, int]] = {}
        """By anchor: how many texts there are of each length."""
        self._num_children: dict[bytes, int] = {}
        self._recency = Recency()
        self._num_bytes = 0
        self._unsaved: dict[bytes, _Row | None] = {}
        """Rows to insert, or None to delete, with the next transaction."""
        self._commit_lock = threading.Lock()
        self._ticks_due_s = 0.0
        self._trouble = Trouble(_log)
        self.note: str | None = None
        """A sentence for people when a damaged database was set aside."""
        self._database: Database | None = None
        self._pulse: Pulse | None = None
        if path is not None:
            self._database = Database(
                path, schema=_SCHEMA, application_id=_APPLICATION_ID, version=_VERSION, load=self._load
            )
            self.note = self._database.note
            if flush_interval_s is not None:
                self._pulse = Pulse(self.flush, flush_interval_s, "hcache-transcripts")
            with self._lock:
                self._evict()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """What the rows weigh; at most the capacity."""
        return self._num_bytes

    def remember(self, tenant: bytes, text: str, token_ids: Sequence[int]) -> None:
        """Remember that `text` was made of `token_ids`. A text that is remembered already keeps its ids. Raises
        OverflowError for ids that are not unsigned 32-bit integers."""
        packed = pack_tokens(token_ids)
        rolling = RollingText(tenant, text)
        key, anchor = rolling.whole()
        found = self._longest(rolling, len(text))
        if found is not None and found[0].key == key:
            return
        parent, parent_ids = (None, b"") if found is None else (found[0].key, found[1])
        num_kept = _num_common(parent_ids, packed)
        row = _Row(
            key=key,
            anchor=anchor,
            num_chars=len(text),
            parent=parent if num_kept else None,
            num_kept=num_kept,
            delta=packed[4 * num_kept :],
            seal=_seal(key, packed),
        )
        with self._lock:
            rival = self._rows.get(key)
            if rival is not None:
                if (rival.anchor, rival.num_chars) == (row.anchor, row.num_chars):
                    return  # remembered by another thread meanwhile
                self._remove(rival)  # damaged: nobody can find it
            if row.num_bytes > self._capacity_bytes:
                return
            self._add(row)
            self._recency.add(key, row.parent, row.num_chars)
            self._unsaved[key] = row
            self._evict()
        if self._pulse is not None:
            self._pulse.poke()

    def longest_prefix(self, tenant: bytes, text: str) -> tuple[int, list[int]] | None:
        """The longest remembered text that `text` begins with: how many characters it has, and its ids. Counts as
        use."""
        found = self._longest(RollingText(tenant, text), len(text))
        return None if found is None else (found[0].num_chars, unpack_tokens(found[1]))

    def forget(self, tenant: bytes, text: str) -> int:
        """Forget the remembered texts that `text` begins with, from the longest down to the first one whose ids another
        remembered text goes on from. Returns how many. Their ids leave the database with the next commit."""
        num_forgotten = 0
        rolling = RollingText(tenant, text)
        for row in self._candidates(rolling, len(text)):
            with self._lock:
                if self._num_children.get(row.key):
                    break
                num_forgotten += self._remove(row)
        if num_forgotten and self._pulse is not None:
            self._pulse.poke()
        return num_forgotten

    def expire(self, since_s: float) -> int:
        """Forget texts that were last used before `since_s` (seconds since 1970). Returns how many."""
        with self._lock:
            return sum(self._remove(self._rows[key]) for key in self._recency.unused_since(since_s))

    def flush(self) -> None:
        """Return when everything remembered before the call is durable. Blocks on I/O. A database that cannot be
        written is warned about and tried again with the next flush."""
        with self._commit_lock:
            database = self._database
            if database is None:
                return
            now_s = time.monotonic()
            with self._lock:
                unsaved, self._unsaved = self._unsaved, {}
                moved = self._recency.take_moved() if now_s >= self._ticks_due_s else []
                added = [(row, self._recency.tick_of(key)) for key, row in unsaved.items() if row is not None]

            def change(connection: sqlite3.Connection) -> None:
                gone = [(key,) for key, row in unsaved.items() if row is None]
                connection.executemany("DELETE FROM transcript WHERE key = ?", gone)
                connection.executemany(_INSERT, [_values(row, tick) for row, tick in added])
                used = [(tick, key) for key, tick in moved if key not in unsaved]
                connection.executemany("UPDATE transcript SET last_used = ? WHERE key = ?", used)

            try:
                if unsaved or moved:
                    database.transact(change)
            except sqlite3.Error as error:
                self._trouble.tell("transcripts cannot be saved (%s); new ones are not durable", error)
                with self._lock:
                    self._unsaved = unsaved | self._unsaved
                    self._recency.note_moved(key for key, _ in moved)
                return
            if moved:
                self._ticks_due_s = now_s + _TICKS_INTERVAL_S

    def vacuum(self) -> None:
        """See `Database.vacuum`."""
        with self._commit_lock:
            if self._database is not None:
                self._database.vacuum()

    def close(self) -> None:
        """Flush, then release the file. Idempotent; after it, what is remembered is not saved."""
        if self._pulse is not None:
            self._pulse.stop()
        self._ticks_due_s = 0.0
        self.flush()
        with self._commit_lock:  # somebody else may be flushing
            database, self._database = self._database, None
            if database is not None:
                database.close()

    def _longest(self, rolling: RollingText, num_chars: int) -> tuple[_Row, bytes] | None:
        """The longest remembered prefix that can be rebuilt, with its packed ids."""
        for row in self._candidates(rolling, num_chars):
            packed = self._rebuild(row)
            with self._lock:
                if packed is not None:
                    self._recency.use([row.key])
                    return row, packed
                self._remove(row)
        return None

    def _candidates(self, rolling: RollingText, num_chars: int) -> Iterator[_Row]:
        """Remembered prefixes of the text, longest first."""
        steps = [
            (start, hasher.copy(), anchor) for start, anchor, hasher in rolling.anchors() if anchor in self._lengths
        ]
        for start, hasher, anchor in reversed(steps):
            with self._lock:
                lengths = sorted(self._lengths.get(anchor, ()), reverse=True)
            for length in lengths:
                row = self._rows.get(rolling.hash_at(length, start, hasher)) if length <= num_chars else None
                if row is not None and row.num_chars == length:
                    yield row

    def _rebuild(self, row: _Row) -> bytes | None:
        """A row's packed ids, None when its chain is broken or damaged."""
        chain = [row]
        while chain[-1].parent is not None:
            parent = self._rows.get(chain[-1].parent)
            if parent is None or parent.num_chars >= chain[-1].num_chars:
                return None
            chain.append(parent)
        packed = bytearray()
        for step in reversed(chain):
            del packed[4 * step.num_kept :]
            packed += step.delta
        return bytes(packed) if _seal(row.key, packed) == row.seal else None

    def _add(self, row: _Row) -> None:
        """Lock held."""
        self._rows[row.key] = row
        lengths = self._lengths.setdefault(row.anchor, {})
        lengths[row.num_chars] = lengths.get(row.num_chars, 0) + 1
        if row.parent is not None:
            self._num_children[row.parent] = self._num_children.get(row.parent, 0) + 1
        self._num_bytes += row.num_bytes

    def _remove(self, row: _Row) -> bool:
        """Lock held."""
        if self._rows.get(row.key) is not row:
            return False
        del self._rows[row.key]
        self._recency.remove(row.key)
        _count_down(self._lengths[row.anchor], row.num_chars)
        if not self._lengths[row.anchor]:
            del self._lengths[row.anchor]
        if row.parent is not None:
            _count_down(self._num_children, row.parent)
        self._num_bytes -= row.num_bytes
        self._unsaved[row.key] = None
        return True

    def _evict(self) -> None:
        """Lock held."""
        while self._num_bytes > self._capacity_bytes:
            self._remove(self._rows[next(self._recency.victims())])

    def _load(self, connection: sqlite3.Connection) -> None:
        rows = []
        for values in connection.execute("SELECT * FROM transcript"):
            types = tuple(type(value) for value in values)
            if types not in (_TYPES, (*_TYPES[:3], type(None), *_TYPES[4:])):
                raise CorruptChunkError("a row is malformed")
            if not all(0 <= number <= MAX_COUNT for number in (values[2], values[4], values[7])):
                raise CorruptChunkError("a row has impossible numbers")
            key, anchor, num_chars, parent, num_kept, delta, seal, last_used = values
            row = _Row(
                key=key, anchor=anchor, num_chars=num_chars, parent=parent, num_kept=num_kept, delta=delta, seal=seal
            )
            rows.append((row, last_used))
        for row, _ in rows:
            self._add(row)
        self._recency.load((row.key, row.parent, row.num_chars, last_used) for row, last_used in rows)


def _values(row: _Row, last_used: int) -> tuple[object, ...]:
    return row.key, row.anchor, row.num_chars, row.parent, row.num_kept, row.delta, row.seal, last_used


def _seal(key: bytes, packed: bytes | bytearray) -> bytes:
    return hashlib.blake2b(packed, key=key[:64], digest_size=16).digest()


def _num_common(left: bytes, right: bytes) -> int:
    """How many leading ids are equal."""
    low, high = 0, min(len(left), len(right)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        if left[4 * low : 4 * middle] == right[4 * low : 4 * middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _count_down(counts: dict[_K, int], key: _K) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
