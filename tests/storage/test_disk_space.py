"""What a disk has left, next to what saved state may take of it."""

from __future__ import annotations

from collections import namedtuple

import pytest

from mii_hcache.storage import disk_space
from mii_hcache.storage.disk_space import disk_space_of, why_scarce
from mii_hcache.storage.state_dir import NAMESPACE_FILE

GIB = 1 << 30


@pytest.fixture
def small_disk(monkeypatch):
    """100 GiB, of which one is free."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage(100 * GIB, 99 * GIB, GIB))


def _save(directory, num_bytes):
    (directory / "segments").mkdir(exist_ok=True)
    (directory / "segments" / "00000001.seg").write_bytes(bytes(range(256)) * (num_bytes // 256))


def test_what_is_held_already_is_room_as_well(small_disk, tmp_path):
    assert disk_space_of(tmp_path).held_bytes == 0
    _save(tmp_path, 1 << 20)
    space = disk_space_of(tmp_path)
    assert (space.free_bytes, space.total_bytes) == (GIB, 100 * GIB)
    assert space.held_bytes >= 1 << 20 and space.usable_bytes == GIB + space.held_bytes


def test_a_capacity_that_the_disk_has_not_is_told(small_disk, tmp_path):
    assert why_scarce(tmp_path, GIB) is None
    told = why_scarce(tmp_path, 20 * GIB)
    assert told is not None and str(tmp_path) in told and "1GiB" in told and "20GiB" in told
    _save(tmp_path, 1 << 20)
    assert why_scarce(tmp_path, GIB + (1 << 20)) is None, "a full store on a full disk has its room"


def test_nobody_guesses(small_disk, monkeypatch, tmp_path):
    (tmp_path / NAMESPACE_FILE).write_text("0000:01:00.0")
    assert why_scarce(tmp_path, 20 * GIB) is None, "state lies on a namespace, not on this disk"
    monkeypatch.undo()
    assert why_scarce(tmp_path / "gone", 20 * GIB) is None
