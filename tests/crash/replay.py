"""What a power cut would leave: a record of `preload.c`, cut anywhere, replayed with any of what was not synced.

The model is that of POSIX, harsher than ext4's. A write, a change of size or a hole is durable once a sync of its file
began after it had ended, and ended before the cut; until then any part of it, in sectors of 512 bytes, may be on the
disk or not, whatever the order in which things were written. A change of a directory is durable once the directory was
synced; those that were not are kept in order, up to some point.
"""

from __future__ import annotations

import os
import random
import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_RECORD = struct.Struct("<IIQQqq")
_WRITE, _END, _SYNC, _TRUNCATE, _PUNCH, _CREATE, _UNLINK, _RENAME, _MKDIR, _NOTE = range(1, 11)
_SECTOR_BYTES = 512


@dataclass(eq=False, kw_only=True)
class _Change:
    """A change of a file's bytes, or of a directory's names."""

    kind: int
    began: int
    ended: int
    """Position in the record when it had happened; beyond the record when it never ended."""
    offset: int = 0
    size: int = 0
    data: bytes = b""
    names: tuple[str, ...] = ()
    node: _Node | None = None
    """What a new name stands for."""


@dataclass(eq=False, kw_only=True)
class _Node:
    """A file or a directory."""

    is_dir: bool
    initial: list[_Change] = field(default_factory=list)
    """What a file was made of before the record began."""
    entries: dict[str, _Node] = field(default_factory=dict)
    """Of a directory, before the record began."""
    changes: list[_Change] = field(default_factory=list)
    syncs: list[tuple[int, int]] = field(default_factory=list)
    """Began, ended."""

    def split(self, cut: int) -> tuple[list[_Change], list[_Change]]:
        """Changes that a cut cannot undo, and those of which any part may be there."""
        last_sync = max((began for began, ended in self.syncs if ended < cut), default=-1)
        begun = self.changes[: bisect_left(self.changes, cut, key=lambda change: change.began)]
        durable = [change for change in begun if change.ended < last_sync]
        return durable, [change for change in begun if change.ended >= last_sync]


class Replay:
    """A record, read. `root` is the directory that was recorded; it held nothing, or what `Base` remembers of it."""

    def __init__(self, log: Path, root: Path, base: Base | None = None) -> None:
        self._root = os.fspath(root)
        self.top = base.top if base else _Node(is_dir=True)
        inodes = dict(base.inodes) if base else {}
        inodes[os.stat(root).st_ino] = self.top
        self.notes: list[tuple[int, str]] = []
        """What the process said, and when."""
        self.num_records = 0
        open_changes: dict[int, _Change] = {}
        open_syncs: dict[int, tuple[_Node, int]] = {}
        self.num_syncs = 0
        for position, (kind, id_, inode, offset, size, data) in enumerate(_records(log)):
            self.num_records = position + 1
            if kind == _NOTE:
                self.notes.append((position, data.decode()))
            elif kind == _END:
                if id_ in open_changes:
                    open_changes.pop(id_).ended = position
                elif id_ in open_syncs:
                    node, began = open_syncs.pop(id_)
                    node.syncs.append((began, position))
                    self.num_syncs += 1
            elif kind in (_WRITE, _TRUNCATE, _PUNCH):
                node = inodes.get(inode)
                if node is None:
                    continue
                never = 1 << 60
                change = _Change(kind=kind, began=position, ended=never, offset=offset, size=size, data=data)
                if kind == _WRITE:
                    open_changes[id_] = change
                else:
                    change.ended = position
                node.changes.append(change)
            elif kind == _SYNC:
                if inode in inodes:
                    open_syncs[id_] = inodes[inode], position
            else:
                self._change_names(kind, inode, data, position, inodes)

    def notes_before(self, cut: int) -> list[str]:
        """What had been said by then."""
        return [text for position, text in self.notes if position < cut]

    def image(self, cut: int, target: Path, rng: random.Random, share: float | None) -> None:
        """Write what a cut might leave to a new directory. `share` of what was not synced is there: 0 for none of it, 1
        for all (as when only the process dies), None for a share that differs by file."""
        _write_dir(self.top, cut, target, rng, share)

    def _change_names(self, kind: int, inode: int, data: bytes, position: int, inodes: dict[int, _Node]) -> None:
        paths = [os.path.relpath(os.fsdecode(part), self._root) for part in data.split(b"\0")]
        parent_name, name = os.path.split(paths[0])
        parent = self._find_dir(parent_name)
        if parent is None:
            return
        change = _Change(kind=kind, began=position, ended=position, names=(name,))
        if kind == _CREATE:
            change.node = inodes[inode] = _Node(is_dir=False)
        elif kind == _MKDIR:
            change.node = _Node(is_dir=True)
            stat_path = os.path.join(self._root, paths[0])
            if os.path.isdir(stat_path):
                inodes[os.stat(stat_path).st_ino] = change.node
        elif kind == _RENAME:
            assert os.path.dirname(paths[1]) == parent_name, "a rename between directories is not modelled"
            change.names = (name, os.path.basename(paths[1]))
        parent.changes.append(change)

    def _find_dir(self, relative: str) -> _Node | None:
        node: _Node | None = self.top
        for part in [part for part in relative.split(os.sep) if part not in ("", ".")]:
            assert node is not None
            node = _names(node, node.changes).get(part)
            if node is None:
                return None
        return node


class Base:
    """A directory as it lies on the disk before a record of it is made: all of it is durable."""

    def __init__(self, root: Path) -> None:
        self.inodes: dict[int, _Node] = {}
        self.top = self._read(root)

    def _read(self, path: Path) -> _Node:
        if path.is_dir():
            node = _Node(is_dir=True, entries={entry.name: self._read(entry) for entry in path.iterdir()})
        else:
            node = _Node(is_dir=False, initial=list(_extents(path)))
        self.inodes[path.stat().st_ino] = node
        return node


def _records(log: Path) -> Iterator[tuple[int, int, int, int, int, bytes]]:
    raw = log.read_bytes()
    position = 0
    while position + _RECORD.size <= len(raw):
        kind, length, id_, inode, offset, size = _RECORD.unpack_from(raw, position)
        position += _RECORD.size
        if position + length > len(raw):
            return  # the process died while it wrote this
        yield kind, id_, inode, offset, size, raw[position : position + length]
        position += length


def _names(node: _Node, changes: list[_Change]) -> dict[str, _Node]:
    entries = dict(node.entries)
    for change in changes:
        if change.kind in (_CREATE, _MKDIR):
            assert change.node is not None
            entries[change.names[0]] = change.node
        elif change.kind == _UNLINK:
            entries.pop(change.names[0], None)
        elif change.names[0] in entries:
            entries[change.names[1]] = entries.pop(change.names[0])
    return entries


def _write_dir(node: _Node, cut: int, target: Path, rng: random.Random, share: float | None) -> None:
    target.mkdir(mode=0o700)
    durable, pending = node.split(cut)
    kept = round(len(pending) * share) if share is not None else rng.randint(0, len(pending))
    for name, child in _names(node, durable + pending[:kept]).items():
        if child.is_dir:
            _write_dir(child, cut, target / name, rng, share)
        else:
            _write_file(child, cut, target / name, rng, share)


def _write_file(node: _Node, cut: int, target: Path, rng: random.Random, share: float | None) -> None:
    durable, pending = node.split(cut)
    if share is None:
        share = rng.choice([0.0, 0.5, 0.9, 1.0])
    is_durable = {id(change) for change in durable}
    target.touch(0o600)
    with target.open("r+b") as file:  # sparse, as it was
        for change in node.initial:
            _apply(file.fileno(), change, None)
        for change in sorted(durable + pending, key=lambda change: change.began):
            part = 1.0 if id(change) in is_durable else share
            if part == 1.0 or rng.random() < part:
                _apply(file.fileno(), change, None if part == 1.0 or rng.random() < 0.7 else rng)


def _apply(fd: int, change: _Change, torn_by: random.Random | None) -> None:
    if change.kind == _TRUNCATE:
        os.ftruncate(fd, change.size)
    elif change.kind == _PUNCH:
        stop = min(change.offset + change.size, os.fstat(fd).st_size)
        if stop > change.offset:
            os.pwrite(fd, bytes(stop - change.offset), change.offset)
    elif torn_by is None:
        os.pwrite(fd, change.data, change.offset)
    else:
        for start in range(0, len(change.data), _SECTOR_BYTES):
            if torn_by.random() < 0.5:
                os.pwrite(fd, change.data[start : start + _SECTOR_BYTES], change.offset + start)


def _extents(path: Path) -> Iterator[_Change]:
    """What makes a file what it is."""
    with path.open("rb") as file:
        fd, size, stop = file.fileno(), path.stat().st_size, 0
        yield _Change(kind=_TRUNCATE, began=-1, ended=-1, size=size)
        while stop < size:
            try:
                start = os.lseek(fd, stop, os.SEEK_DATA)
            except OSError:  # only a hole is left
                return
            stop = os.lseek(fd, start, os.SEEK_HOLE)
            yield _Change(kind=_WRITE, began=-1, ended=-1, offset=start, data=os.pread(fd, stop - start, start))
