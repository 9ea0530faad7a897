"""Forgeries: parts of a store's files changed, with every checksum made right again."""

from __future__ import annotations

import random
import shutil
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from crc32c import crc32c

from mii_hcache.storage.catalog import _row_crc
from mii_hcache.storage.format import BLOCK_BYTES

_LIMITS = (0, 1, -1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, -(2**63))


def forge(root: Path, rng: random.Random) -> str:
    """Forge one thing in the state directory `root`. Returns what, for people."""
    way = rng.choice(_WAYS)
    return f"{way.__name__.strip('_')}: {way(root, rng)}"


def _segment(root: Path, rng: random.Random) -> str:
    """A field of a segment's header."""
    path = _some_segment(root, rng)
    if path is None:
        return "none there"
    data = bytearray(path.read_bytes())
    offset, size = rng.choice([(0, 8), (8, 4), (12, 16), (28, 8), (36, 8), (44, 8)])  # see storage/format.py
    _change(data, offset, size, rng)
    _seal(data, 0)
    path.write_bytes(data)
    return f"{path.name} [{offset}]"


def _slot(root: Path, rng: random.Random) -> str:
    """A field of a slot's header."""
    path = _some_segment(root, rng)
    if path is None:
        return "none there"
    data = bytearray(path.read_bytes())
    starts = [start for start in range(BLOCK_BYTES, len(data), BLOCK_BYTES) if data[start : start + 8] == b"HCACHESL"]
    if not starts:
        return "no slot there"
    start = rng.choice(starts)
    offset, size = rng.choice(
        [(0, 8), (8, 4), (12, 16), (28, 32), (60, 4), (64, 1), (68, 8), (76, 8), (84, 4), (88, 9)]
    )
    _change(data, start + offset, size, rng)
    _seal(data, start)
    path.write_bytes(data)
    return f"{path.name} {start} [{offset}]"


def _copied_slot(root: Path, rng: random.Random) -> str:
    """A whole slot, header, payload and all, over another one."""
    path = _some_segment(root, rng)
    if path is None:
        return "none there"
    data = bytearray(path.read_bytes())
    slot_bytes = struct.unpack_from("<Q", data, 28)[0]
    num_slots = (len(data) - BLOCK_BYTES) // slot_bytes if 8192 <= slot_bytes <= len(data) else 0
    if num_slots < 2:
        return "too few slots"
    source, target = (BLOCK_BYTES + rng.randrange(num_slots) * slot_bytes for _ in range(2))
    data[target : target + slot_bytes] = data[source : source + slot_bytes]
    path.write_bytes(data)
    return f"{path.name} {source} -> {target}"


def _row(root: Path, rng: random.Random) -> str:
    """Columns of a span's row: anything, or those of another row."""
    with closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        rows = connection.execute("SELECT * FROM span").fetchall()
        if not rows:
            return "no rows"
        row, other = list(rng.choice(rows)), rng.choice(rows)
        key, changed = row[0], rng.sample(range(11), rng.choice([1, 1, 2, 3]))
        for column in changed:
            row[column] = other[column] if rng.random() < 0.3 else _anything(row[column], rng)
        if 9 not in changed:
            try:
                row[9] = _row_crc(row[:9])
            except (TypeError, struct.error):
                row[9] = 0
        names = [description[0] for description in connection.execute("SELECT * FROM span LIMIT 0").description]
        try:
            sets = ", ".join(f"{name} = ?" for name in names)
            connection.execute(f"UPDATE OR REPLACE span SET {sets} WHERE span_id = ?", [*row, key])
            connection.commit()
        except sqlite3.IntegrityError:
            return "refused by SQLite"
    return ", ".join(names[column] for column in changed)


def _identity(root: Path, rng: random.Random) -> str:
    """The store's own row."""
    column = rng.choice(["uuid", "generation", "generation"])
    with closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        (value,) = connection.execute(f"SELECT {column} FROM store").fetchone() or (0,)
        try:
            connection.execute(f"UPDATE store SET {column} = ?", (_anything(value, rng),))
            connection.commit()
        except sqlite3.IntegrityError:
            return "refused by SQLite"
    return column


def _transcript(root: Path, rng: random.Random) -> str:
    """A column of a remembered text."""
    if not (root / "transcripts.sqlite").exists():  # one directory of several keeps them
        return "none there"
    with closing(sqlite3.connect(root / "transcripts.sqlite")) as connection:
        rows = connection.execute("SELECT rowid, * FROM transcript").fetchall()
        if not rows:
            return "no rows"
        row, other = rng.choice(rows), rng.choice(rows)
        names = ("key", "anchor", "num_chars", "parent", "num_kept", "delta", "seal", "last_used")
        column = rng.randrange(len(names))
        value = other[column + 1] if rng.random() < 0.4 else _anything(row[column + 1], rng)
        try:
            connection.execute(f"UPDATE OR REPLACE transcript SET {names[column]} = ? WHERE rowid = ?", (value, row[0]))
            connection.commit()
        except sqlite3.IntegrityError:
            return "refused by SQLite"
    return names[column]


def _other_file(root: Path, rng: random.Random) -> str:
    """A segment under another name, or twice."""
    path = _some_segment(root, rng)
    if path is None:
        return "none there"
    name = rng.choice(
        ["00000009.seg", "1.seg", "2147483647.seg", "2147483648.seg", "4294967295.seg", "9" * 30 + ".seg"]
    )
    if path.name != name:
        shutil.copy(path, path.with_name(name))
    return name


def _some_segment(root: Path, rng: random.Random) -> Path | None:
    paths = [path for path in sorted((root / "segments").glob("*.seg")) if path.stat().st_size > BLOCK_BYTES]
    return rng.choice(paths) if paths else None


def _change(data: bytearray, offset: int, size: int, rng: random.Random) -> None:
    if size in (4, 8) and rng.random() < 0.6:
        value = rng.choice(
            [*_LIMITS, int.from_bytes(data[offset : offset + size], "little") + rng.choice([-1, 1, 4096])]
        )
        data[offset : offset + size] = (value % (1 << (8 * size))).to_bytes(size, "little")
    else:
        data[offset + rng.randrange(size)] ^= 1 << rng.randrange(8)


def _seal(data: bytearray, start: int) -> None:
    stop = start + BLOCK_BYTES - 4
    data[stop : stop + 4] = crc32c(bytes(data[start:stop])).to_bytes(4, "little")


def _anything(value: Any, rng: random.Random) -> Any:
    """Something like `value`, or nothing like it."""
    if rng.random() < 0.3:
        return rng.choice([None, 0, 1.5, "text", b"", bytes(32), b"\xff" * 36, *_LIMITS])
    if isinstance(value, int):
        near = rng.choice([*_LIMITS, value + 1, value - 1, value + 4096, value ^ (1 << rng.randrange(40))])
        return max(-(1 << 63), min((1 << 63) - 1, near))  # SQLite holds no more
    if isinstance(value, bytes) and value:
        changed = bytearray(value)
        match rng.randrange(4):
            case 0:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            case 1:
                del changed[rng.randrange(len(changed)) :]
            case 2:
                changed += rng.randbytes(rng.choice([1, 12, 36]))
            case _:
                start = rng.randrange(len(changed)) // 4 * 4
                changed[start : start + 4] = rng.choice([bytes(4), b"\xff" * 4, b"\1\0\0\0"])
        return bytes(changed)
    return value


_WAYS: list[Callable[[Path, random.Random], str]] = [
    _segment,
    _slot,
    _copied_slot,
    _row,
    _row,
    _row,
    _identity,
    _transcript,
    _other_file,
]
