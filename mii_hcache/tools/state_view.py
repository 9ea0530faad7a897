"""A state directory seen from outside: nothing in it is written, locked or waited for, whether or not a server runs.

The databases are looked at in private copies. While a server owns the directory the copy is SQLite's own online backup,
one consistent moment read through the log beside it; else the files are copied as they lie, damage included. Copies are
opened by the code that a server opens the originals with, so what it would refuse is refused here.
"""

from __future__ import annotations

import logging
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from mii_hcache.errors import ConfigError
from mii_hcache.storage.catalog import Catalog, SpanRow
from mii_hcache.storage.format import BLOCK_BYTES, FORMAT_VERSION, SegmentHeader
from mii_hcache.storage.state_dir import NAMESPACE_FILE, owner_of, store_uuid_in
from mii_hcache.storage.survey import DAMAGED, FOREIGN, OLD, UNFINISHED, FoundFile, survey
from mii_hcache.storage.transcripts import Transcripts

_OURS = ("catalog*.sqlite*", "transcripts*.sqlite*", "segments", "store.id", "lock", NAMESPACE_FILE)
_WHO_CARES = {
    FOREIGN: "a server leaves it alone",
    OLD: "`gc` removes it",
    UNFINISHED: "a server, or `gc`, removes it",
}


@dataclass(frozen=True, kw_only=True)
class SegmentView:
    """One segment file."""

    name: str
    number: int
    slot_bytes: int
    num_slots: int
    num_used: int
    """Slots that hold chunks of spans in the catalog."""
    num_free: int
    """Other slots that take room on the disk."""
    disk_bytes: int
    """What the file takes on disk, holes left out."""
    unused_bytes: int
    """What it takes beside its header and the slots that are used."""


@dataclass(kw_only=True)
class StateView:
    """What a state directory held at one moment."""

    path: Path
    owner: str | None
    """Process id of the server that owns the directory, `unknown` if it does not say, None when nobody does."""
    store_uuid: bytes | None = None
    format_version: int = FORMAT_VERSION
    """The one that was read; a store of another version is a problem, not a view."""
    rows: list[SpanRow] = field(default_factory=list)
    segments: list[SegmentView] = field(default_factory=list)
    files: list[FoundFile] = field(default_factory=list)
    """Everything that lies beside the segments, they themselves included."""
    num_transcripts: int = 0
    database_bytes: int = 0
    """What the databases and their logs take, set-aside ones included. A server's capacity does not count them."""
    notes: list[str] = field(default_factory=list)
    """What people should know, and is no damage."""
    num_lost_spans: int = 0
    """Of `rows`: those that lie in segment files that are gone or unreadable."""
    broken: set[str] = field(default_factory=set)
    """Names of databases that cannot be used, or are missing though they should be there."""
    problems: list[str] = field(default_factory=list)
    """What is damaged or lost, one sentence each."""


def look_at(directory: Path) -> StateView:
    """Read everything but the chunks. Blocks on I/O. Raises ConfigError when this is no state directory or may not be
    read."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory; give the one that the server's --state-dir names")
    try:
        if any(directory.iterdir()) and not any(path for pattern in _OURS for path in directory.glob(pattern)):
            raise ConfigError(f"{directory} is no state directory: it has files, and none of a server's")
        view = StateView(path=directory, owner=owner_of(directory), store_uuid=store_uuid_in(directory))
        view.rows = read_rows(view)
        _look_at_transcripts(view)
        _look_at_segments(view)
        view.database_bytes = sum(_disk_bytes(path) for path in databases_in(directory))
    except OSError as error:
        raise ConfigError(f"{directory} cannot be read ({error}); be the user that the server runs as") from error
    view.notes += [
        f"{path.name} was set aside as damaged by a server; nobody needs it any more, and `gc` removes it"
        for path in sorted(directory.glob("*.damaged-*.sqlite"))
    ]
    return view


def databases_in(directory: Path) -> list[Path]:
    """The databases of a state directory with their logs, set-aside ones included."""
    return sorted(path for pattern in _OURS[:2] for path in directory.glob(pattern))


def _disk_bytes(path: Path) -> int:
    """Nothing for a log that its server has put away a moment ago."""
    try:
        return 512 * path.stat().st_blocks
    except FileNotFoundError:
        return 0


def read_rows(view: StateView) -> list[SpanRow]:
    """The catalog's rows now; what is wrong with the catalog is added to the view's problems."""
    with _frozen(view, "catalog.sqlite") as copy:
        if copy is None:
            if any((view.path / "segments").glob("*.seg")):
                view.broken.add("catalog.sqlite")
                view.problems.append("the catalog is missing, and without it nobody knows what the segments hold")
            return []
        catalog = Catalog(copy, view.store_uuid)
        try:
            if catalog.note is not None:
                view.broken.add("catalog.sqlite")
                view.problems.append(
                    f"the catalog cannot be used ({_reason(catalog.note)}); a server would start empty"
                )
            elif view.store_uuid is None:
                view.store_uuid = catalog.store_uuid
            return catalog.rows
        finally:
            catalog.close()


def _look_at_transcripts(view: StateView) -> None:
    with _frozen(view, "transcripts.sqlite") as copy:
        if copy is None:
            return
        transcripts = Transcripts(copy, flush_interval_s=None)
        view.num_transcripts = len(transcripts)
        if transcripts.note is not None:
            view.broken.add("transcripts.sqlite")
            view.problems.append(
                f"the transcripts cannot be used ({_reason(transcripts.note)}); they would be forgotten"
            )
        transcripts.close()


def _look_at_segments(view: StateView) -> None:
    if (view.path / NAMESPACE_FILE).exists():
        view.notes.append("the segments lie on an NVMe namespace, which only a server looks at")
        return
    used: dict[int, set[int]] = {}
    for row in view.rows:
        for number, slot in row.places:
            used.setdefault(number, set()).add(slot)
    view.files = survey(view.path / "segments", view.store_uuid)
    for file in view.files:
        if file.state == DAMAGED:
            if view.owner is None:  # a server may be making it just now
                view.problems.append(f"{file.path.name} is no segment file: {file.why}")
        elif file.header is None:
            view.notes.append(f"{file.path.name} lies beside the segments: {file.why}; {_WHO_CARES[file.state]}")
        else:
            view.segments.append(_segment_view(file, file.header, len(used.get(file.number, ()))))
    lost = set(used) - {segment.number for segment in view.segments}
    view.num_lost_spans = sum(any(place.segment in lost for place in row.places) for row in view.rows)
    if view.num_lost_spans and view.owner is None:
        view.problems.append(f"{view.num_lost_spans} spans lie in segment files that are gone or unreadable")


def _segment_view(file: FoundFile, header: SegmentHeader, num_used: int) -> SegmentView:
    """A file's end runs ahead of its slots, and holes are where slots were given back: blocks tell what is there."""
    unused_bytes = max(0, file.disk_bytes - BLOCK_BYTES - num_used * header.slot_bytes)
    return SegmentView(
        name=file.path.name,
        number=file.number,
        slot_bytes=header.slot_bytes,
        num_slots=header.num_slots,
        num_used=num_used,
        num_free=min(max(0, file.num_written - num_used), -(-unused_bytes // header.slot_bytes)),
        disk_bytes=file.disk_bytes,
        unused_bytes=unused_bytes,
    )


@contextmanager
def _frozen(view: StateView, name: str) -> Iterator[Path | None]:
    """A private copy of a database as it is at one moment, None when there is none."""
    source = view.path / name
    log = source.with_name(name + "-wal")
    with tempfile.TemporaryDirectory(prefix="hcache-inspect-") as folder:
        copy = Path(folder) / name
        if view.owner is None:
            if not source.exists() and not log.exists():
                yield None
                return
            for file in (source, log):
                if file.exists():
                    shutil.copyfile(file, copy.with_name(file.name))
            view.owner = owner_of(view.path)
        if view.owner is not None:
            copy.unlink(missing_ok=True)
            copy.with_name(log.name).unlink(missing_ok=True)
            _back_up(source, copy)
        with _silent():
            yield copy


def _back_up(source: Path, copy: Path) -> None:
    try:
        with (
            closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True, timeout=5.0)) as live,
            closing(sqlite3.connect(copy)) as target,
        ):
            live.backup(target)
    except sqlite3.Error as error:
        raise ConfigError(f"{source} cannot be read while a server has it ({error}); stop the server first") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Storage warns of what it does to the copy, which is nobody's concern."""
    log = logging.getLogger("mii_hcache.storage")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _reason(note: str) -> str:
    """Why storage set a database aside, out of its sentence about the copy."""
    found = re.search(r"cannot be used \((.*)\); it was set aside", note)
    return found.group(1) if found else note
