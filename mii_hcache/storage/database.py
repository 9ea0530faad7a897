"""A SQLite file of ours: checked when it is opened, set aside when it is damaged."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from mii_hcache.errors import ConfigError, CorruptChunkError, StateDirBusyError
from mii_hcache.storage.state_dir import open_private, sync_dir

_log = logging.getLogger(__name__)
_NOT_THE_FILE = ("disk I/O error", "unable to open database file", "database or disk is full")

MAX_COUNT = 1 << 62
"""Counts above are not believed: generations and ticks that are counted on from must still fit SQLite's integers."""


class Database:
    """One connection in WAL mode. Opening makes the file when there is none, and blocks on I/O.

    A file that fails the check (SQLite's, schema, version, or `load`) is renamed to `<stem>.damaged-<n>.sqlite` with
    its log, and a new one is made: what it said is forgotten, never half believed. `note` then says so.

    Raises StateDirBusyError when another program has it locked, ConfigError when the disk is full or fails.

    Not thread-safe: one caller at a time.
    """

    def __init__(
        self,
        path: Path,
        *,
        schema: str,
        application_id: int,
        version: int,
        load: Callable[[sqlite3.Connection], None],
    ) -> None:
        """`load` reads what is there and raises CorruptChunkError when it makes no sense; it is called again after a
        set-aside, on the new file."""
        self._path = path
        self._schema, self._application_id, self._version = schema, application_id, version
        self.note: str | None = None
        """A sentence for people when a damaged file was set aside."""
        self.aside: Path | None = None
        """Where it is now."""
        self._load = load
        try:
            self.connection = self._open_checked()
        except (OSError, sqlite3.DatabaseError, CorruptChunkError) as error:
            _raise_if_sound(path, error)
            self._set_aside(error)
            self.connection = self._open_checked()

    def transact(self, change: Callable[[sqlite3.Connection], None], *, durable: bool = True) -> None:
        """Run `change` in one transaction. Blocks until it is durable; without `durable` it survives the process but
        perhaps not a power cut, until one that is durable follows, or SQLite's log is checkpointed. Raises
        sqlite3.Error, having changed nothing."""
        self.connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            change(self.connection)
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def vacuum(self) -> None:
        """Give back to the disk what deleted rows took. Blocks on I/O, and takes as much of the disk again meanwhile.
        Raises sqlite3.Error, having lost nothing."""
        self.connection.execute("VACUUM")
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self.connection.close()

    def _open_checked(self) -> sqlite3.Connection:
        connection = self._open()
        try:
            self._check(connection)
            self._load(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self) -> sqlite3.Connection:
        if not self._path.exists():
            if any(extra.exists() for extra in _extras(self._path)):
                raise CorruptChunkError("its log is there, the file itself is missing")
            self._make_file(self._path)
        else:
            os.close(open_private(self._path, os.O_RDWR))  # says plainly when the file may not be used
            if not self._path.stat().st_size:
                raise CorruptChunkError("it is empty")
        connection = _connect(str(self._path))
        try:
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("PRAGMA secure_delete = ON")  # token ids of deleted conversations are overwritten
            connection.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _make_file(self, path: Path) -> None:
        """Make the file whole or not at all: a file that is there has its schema."""
        new = path.with_name(path.name + ".new")
        new.unlink(missing_ok=True)
        os.close(open_private(new, os.O_WRONLY | os.O_CREAT))
        with closing(_connect(str(new))) as connection:
            self._create(connection)
        new.replace(path)
        sync_dir(path.parent)

    def _create(self, connection: sqlite3.Connection) -> None:
        connection.executescript(
            f"BEGIN; PRAGMA application_id = {self._application_id}; PRAGMA user_version = {self._version};"
            f"{self._schema}; COMMIT;"
        )

    def _check(self, connection: sqlite3.Connection) -> None:
        answer = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if _text(answer) != "ok":
            raise CorruptChunkError(f"SQLite finds damage: {_text(answer)}")
        if connection.execute("PRAGMA application_id").fetchone()[0] != self._application_id:
            raise CorruptChunkError("it belongs to another program")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != self._version:
            raise CorruptChunkError(f"it has format version {version}, this is {self._version}")
        with closing(_connect(":memory:")) as model:
            self._create(model)
            if _tables(model) != _tables(connection):
                raise CorruptChunkError("its tables are not the expected ones")

    def _set_aside(self, error: Exception) -> None:
        path, n = self._path, 1
        while any(file.exists() for file in (_aside(path, n), *_extras(_aside(path, n)))):
            n += 1
        aside = _aside(path, n)
        for file, target in zip((path, *_extras(path)), (aside, *_extras(aside)), strict=True):
            if file.exists():
                file.rename(target)
        sync_dir(path.parent)
        self.aside = aside
        self.note = (
            f"{path.name} cannot be used ({error}); it was set aside as {aside.name} and a new one started empty"
        )
        _log.warning("%s", self.note)


def _connect(name: str) -> sqlite3.Connection:
    connection = sqlite3.connect(name, timeout=5.0, isolation_level=None, check_same_thread=False)
    connection.text_factory = bytes  # damaged text must not fail to decode
    return connection


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _tables(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()


def _extras(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def _aside(path: Path, n: int) -> Path:
    return path.with_name(f"{path.stem}.damaged-{n}{path.suffix}")


def _raise_if_sound(path: Path, error: Exception) -> None:
    """Raise for errors that say nothing about the file: it must not be set aside for them."""
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        raise StateDirBusyError(f"{path} is locked by another program; close it and start again") from error
    is_about_disk = isinstance(error, sqlite3.OperationalError) and any(words in str(error) for words in _NOT_THE_FILE)
    if is_about_disk or isinstance(error, OSError):
        raise ConfigError(f"{path} cannot be opened ({error}); make room, or choose another state_dir") from error
