"""Which directories a striped store is made of, and which of them are there.

Each directory of a set carries a small file that names the set, the directory's own ordinal, and every member: so the
order in which directories are given means nothing, and one that is not there is missed. A directory that has no such
file, but is known by its path, is new or was emptied, unless the file system it was on is not mounted: then it is
missing, and nothing may be written to what lies below its mount point.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mii_hcache.errors import ConfigError
from mii_hcache.storage.state_dir import open_private, sync_dir
from mii_hcache.storage.workers import StalledError, Workers

_log = logging.getLogger(__name__)

SET_FILE = "set.json"
LOOK_S = 10.0
"""How long a directory is looked at before it counts as one that cannot be read."""
_VERSION = 1
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Member:
    """A directory of a set, as it was when the set was last whole there."""

    ordinal: int
    path: str
    mount: str
    """Mount point of the file system that it was on."""


@dataclass(frozen=True, kw_only=True)
class SetFile:
    """What one directory knows of its set."""

    set_id: str
    ordinal: int
    """The directory's own."""
    generation: int
    """Grows with each change of the members: of two files that differ the higher one is right."""
    members: tuple[Member, ...]

    def pack(self) -> bytes:
        """The file's bytes."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1).encode()

    @staticmethod
    def parse(raw: bytes) -> SetFile:
        """Raises ValueError."""
        try:
            body = json.loads(raw)
            if body["version"] != _VERSION:
                raise ValueError(f"version {body['version']!r} instead of {_VERSION}")
            members = tuple(
                Member(ordinal=_number(one["ordinal"]), path=_text(one["path"]), mount=_text(one["mount"]))
                for one in body["members"]
            )
            found = SetFile(
                set_id=_text(body["set_id"]),
                ordinal=_number(body["ordinal"]),
                generation=_number(body["generation"]),
                members=members,
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a set's file ({error!r})") from error
        ordinals = [member.ordinal for member in members]
        if len(set(ordinals)) != len(ordinals) or found.ordinal not in ordinals:
            raise ValueError("its ordinals contradict each other")
        return found


@dataclass(kw_only=True)
class Seat:
    """A directory that was given."""

    path: Path
    ordinal: int
    mount: str | None = None
    """Where its file system was mounted when it was last there; None when it is new."""
    why_missing: str | None = None
    """For people; None when it can be opened."""


@dataclass(kw_only=True)
class StripeSet:
    """The directories given, by ordinal, and what their files say."""

    set_id: str
    generation: int
    members: dict[int, Member]
    seats: list[Seat]
    """By ordinal."""
    notes: list[str] = field(default_factory=list)
    """Sentences for people."""

    @staticmethod
    def of(paths: Sequence[Path]) -> StripeSet:
        """Look at directories; nothing is written. Blocks on I/O. Raises ConfigError for directories that do not belong
        together, and for what cannot be a set."""
        looking = Workers(len(paths), "hcache-look")  # one that hangs must not hang the start
        with suppress(StalledError):
            looking.call(partial(check_distinct, paths), LOOK_S)
        files, notes, unreadable = {}, [], {}
        for path in paths:
            try:
                files[path] = looking.call(partial(read_set_file, path), LOOK_S)
            except ValueError as error:
                notes.append(f"{path / SET_FILE} cannot be read ({error}); it is written anew")
            except OSError as error:
                unreadable[path] = str(error)
        looking.close(0.0)
        known = {path: file for path, file in files.items() if file is not None}
        _check_one_set(known)
        newest = max(known.values(), key=lambda file: file.generation, default=None)
        members = {} if newest is None else {member.ordinal: member for member in newest.members}
        for file in known.values():  # it joined after the newest file was written, and that one's disk was away
            members.setdefault(file.ordinal, next(one for one in file.members if one.ordinal == file.ordinal))
        made = StripeSet(
            set_id=uuid.uuid4().hex if newest is None else newest.set_id,
            generation=0 if newest is None else newest.generation,
            members=members,
            seats=[],
            notes=notes,
        )
        made._seat(paths, known, unreadable)
        return made

    @property
    def is_striped(self) -> bool:
        """Whether there is more than one directory, here or elsewhere."""
        return len(self.seats) > 1 or len(self.members) > 1

    def look_again(self, seat: Seat) -> None:
        """Whether a seat's directory is there now: sets `why_missing`. Blocks on I/O."""
        try:
            file = read_set_file(seat.path)
        except ValueError:
            file = None
        except OSError as error:
            seat.why_missing = str(error)
            return
        if file is not None and (file.set_id, file.ordinal) != (self.set_id, seat.ordinal):
            seat.why_missing = "another set's directory, or another one of this set, lies there"
        elif file is None and seat.mount is not None and not is_mount_point(Path(seat.mount)):
            seat.why_missing = f"nothing is mounted at {seat.mount}, where it was"
        else:
            seat.why_missing = None

    def record(self, seat: Seat, present: Sequence[Seat]) -> None:
        """`seat` was opened, beside those `present`: learn its mount point and write the set's file, everywhere if the
        members changed. Blocks on I/O. Raises OSError when the directory has no file and cannot get one."""
        seat.mount = str(mount_point(seat.path))
        member = Member(ordinal=seat.ordinal, path=str(seat.path), mount=seat.mount)
        is_new = self.members.get(seat.ordinal) != member
        if is_new:
            self.members = self.members | {seat.ordinal: member}
            self.generation += 1
        for one in [seat, *present] if is_new else [seat]:  # a disk that hangs need not be asked for nothing
            file = SetFile(
                set_id=self.set_id,
                ordinal=one.ordinal,
                generation=self.generation,
                members=tuple(self.members[ordinal] for ordinal in sorted(self.members)),
            )
            try:
                _write_set_file(one.path, file)
            except OSError as error:
                if one is seat and not (one.path / SET_FILE).exists():
                    raise
                _log.warning("%s cannot be written (%s)", one.path / SET_FILE, error)

    def _seat(self, paths: Sequence[Path], known: dict[Path, SetFile], unreadable: dict[Path, str]) -> None:
        taken = {file.ordinal for file in known.values()}
        by_path = {member.path: member for member in self.members.values() if member.ordinal not in taken}
        fresh = []
        for path in paths:
            member = by_path.get(str(path))
            if path in known:
                ordinal = known[path].ordinal
                self.seats.append(Seat(path=path, ordinal=ordinal, mount=self.members[ordinal].mount))
            elif member is not None:
                seat = Seat(path=path, ordinal=member.ordinal, mount=member.mount)
                if path in unreadable:
                    seat.why_missing = unreadable[path]
                else:
                    self.look_again(seat)
                self.seats.append(seat)
            elif path in unreadable:
                raise ConfigError(f"state_dir {path} cannot be used ({unreadable[path]}); choose a directory you own")
            else:
                fresh.append(path)
        # what holds state already comes first: it goes on being what keeps the transcripts, wherever it is named
        fresh.sort(key=lambda path: not (path / "catalog.sqlite").exists())
        for path in fresh:
            ordinal = max([-1, *self.members, *(seat.ordinal for seat in self.seats)]) + 1
            self.seats.append(Seat(path=path, ordinal=ordinal))
        self.seats.sort(key=lambda seat: seat.ordinal)
        given = {seat.ordinal for seat in self.seats}
        for ordinal in sorted(set(self.members) - given):
            self.notes.append(
                f"directory {self.members[ordinal].path} belongs to the set and was not given: what lies there cannot "
                f"be restored until it is (to forget it, delete {SET_FILE} in the others while no server runs)"
            )


def check_distinct(paths: Sequence[Path]) -> None:
    """Raise ConfigError when two are one directory, also through links, or one lies inside another."""
    for idx, path in enumerate(paths):
        for other in paths[:idx]:
            one, two = path.resolve(), other.resolve()
            if one == two or _is_same(one, two):
                raise ConfigError(f"state_dir: {other} and {path} are the same directory; give each once")
            if one in two.parents or two in one.parents:
                raise ConfigError(f"state_dir: of {other} and {path} one lies inside the other; choose separate ones")


def read_set_file(directory: Path) -> SetFile | None:
    """None when there is none. Raises OSError, ValueError."""
    try:
        fd = open_private(directory / SET_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        raw = file.read(_MAX_FILE_BYTES + 1)
    if len(raw) > _MAX_FILE_BYTES:
        raise ValueError("it is too long")
    return SetFile.parse(raw)


def mount_point(path: Path) -> Path:
    """Where the file system that a path is on, or would be made on, is mounted. Raises OSError."""
    path = path.resolve()
    while not path.exists() and path != path.parent:
        path = path.parent
    while not is_mount_point(path):
        path = path.parent
    return path


def is_mount_point(path: Path) -> bool:
    """Whether a file system is mounted right here. Raises no OSError: what cannot be looked at is none."""
    try:
        return path == path.parent or device_of(path) != device_of(path.parent)
    except OSError:
        return False


def device_of(path: Path) -> int:
    """Number of the device that a path is on. Raises OSError."""
    return path.stat().st_dev


def _is_same(one: Path, two: Path) -> bool:
    try:
        return one.samefile(two)
    except OSError:  # one is not there, or cannot be looked at
        return False


def _check_one_set(known: dict[Path, SetFile]) -> None:
    paths = list(known)
    for path in paths[1:]:
        first, file = known[paths[0]], known[path]
        if file.set_id != first.set_id:
            others = ", ".join(member.path for member in file.members)
            raise ConfigError(
                f"state_dir: {path} belongs to another set of directories ({others}) than {paths[0]}; give the "
                f"directories of one set together, or delete {path / SET_FILE} to have it join this one"
            )
    by_ordinal: dict[int, Path] = {}
    for path in paths:
        twin = by_ordinal.setdefault(known[path].ordinal, path)
        if twin != path:
            raise ConfigError(
                f"state_dir: {path} is a copy of {twin}, or the other way round; give one of them, or delete "
                f"{SET_FILE} in the copy"
            )


def _write_set_file(directory: Path, file: SetFile) -> None:
    try:
        if read_set_file(directory) == file:
            return
    except ValueError:
        pass  # it is replaced
    new = directory / (SET_FILE + ".new")
    fd = open_private(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with open(fd, "wb") as opened:
        opened.write(file.pack())
        opened.flush()
        os.fsync(opened.fileno())
    new.replace(directory / SET_FILE)
    sync_dir(directory)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"{value!r} is no number for this")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no text for this")
    return value
