"""Damage to files: what disks, people and restored backups do."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

_PAGE_BYTES = 4096
Files = list[Path]


def damage(root: Path, old: Path, foreign: Path, rng: random.Random) -> str:
    """Damage the files under `root` in one way; `old` is an earlier copy of them, `foreign` another store. Returns what
    was done, for people."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    victim = rng.choice([path for path in files if path.name != "lock"])
    way = rng.choice(_WAYS)
    way(victim, files, old / victim.relative_to(root), foreign / victim.relative_to(root), rng)
    return f"{way.__name__.strip('_')} {victim.relative_to(root)}"


def _flip(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    data = bytearray(victim.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 8, 100]) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)


def _truncate(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    size = victim.stat().st_size
    cut = rng.choice([0, 1, size - 1, rng.randrange(size + 1), rng.randrange(size + 1) // _PAGE_BYTES * _PAGE_BYTES])
    with victim.open("r+b") as file:
        file.truncate(max(0, cut))


def _lengthen(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    with victim.open("ab") as file:
        file.write(rng.choice([bytes(5000), rng.randbytes(5000), victim.read_bytes()[:9000]]))


def _overwrite(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    size = victim.stat().st_size
    start = rng.randrange(size + 1) // _PAGE_BYTES * _PAGE_BYTES
    length = min(size - start, rng.choice([512, 4096, 20_000]))
    with victim.open("r+b") as file:
        file.seek(start)
        file.write(rng.choice([bytes(length), rng.randbytes(length), b"\xff" * length]))


def _swap_pages(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    data = bytearray(victim.read_bytes())
    num_pages = len(data) // _PAGE_BYTES
    if num_pages > 1:
        a, b = (rng.randrange(num_pages) * _PAGE_BYTES for _ in range(2))
        data[a : a + _PAGE_BYTES], data[b : b + _PAGE_BYTES] = data[b : b + _PAGE_BYTES], data[a : a + _PAGE_BYTES]
        victim.write_bytes(data)


def _swap_files(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    other = rng.choice([path for path in files if path.suffix == victim.suffix])
    mine, theirs = victim.read_bytes(), other.read_bytes()
    victim.write_bytes(theirs)
    other.write_bytes(mine)


def _restore_old(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    _take(old, victim)


def _restore_old_pages(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    if not old.is_file():
        return
    data, before = bytearray(victim.read_bytes()), old.read_bytes()
    for start in range(0, min(len(data), len(before)), _PAGE_BYTES):
        if rng.random() < 0.3:
            data[start : start + _PAGE_BYTES] = before[start : start + _PAGE_BYTES]
    victim.write_bytes(data)


def _restore_all_old_segments(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    for path in victim.parents[0 if victim.suffix == ".seg" else 1].glob("**/*.seg"):
        _take(old.parent / path.name, path)


def _take_foreign(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    _take(foreign, victim)


def _delete(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    victim.unlink()


def _duplicate(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    name = rng.choice(["00000009", "1", "00000001", "4294967295", "99999999999999999999", "007", "٣", "-1", "x"])
    _take(rng.choice([victim, old]), victim.with_name(name + victim.suffix))


def _rename(victim: Path, files: Files, old: Path, foreign: Path, rng: random.Random) -> None:
    victim.rename(victim.with_name(rng.choice(["00000002", "00000005", "1", "4294967294"]) + victim.suffix))


def _take(source: Path, target: Path) -> None:
    if source.is_file() and source != target:
        shutil.copy(source, target)


_WAYS: list[Callable[[Path, Files, Path, Path, random.Random], None]] = [
    _flip,
    _flip,
    _flip,
    _truncate,
    _truncate,
    _lengthen,
    _overwrite,
    _overwrite,
    _swap_pages,
    _swap_files,
    _restore_old,
    _restore_old_pages,
    _restore_all_old_segments,
    _take_foreign,
    _delete,
    _duplicate,
    _duplicate,
    _rename,
]
