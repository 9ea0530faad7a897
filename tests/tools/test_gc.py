"""`gc` gives back what nobody needs, and what it was told to; a dry run says the same and does nothing."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from mii_hcache.__main__ import main
from mii_hcache.storage.format import FORMAT_VERSION, SegmentHeader
from mii_hcache.storage.open import open_state
from mii_hcache.storage.state_dir import store_uuid_in
from mii_hcache.tools.scratch import PREFIX
from tests.storage.storage_kit import SPAN_DISK_BYTES, disk_bytes, holds, make_record, put

NUM_SPANS = 12
CHAIN = [make_record(idx, parent=idx - 1 if idx else None, span_idx=idx) for idx in range(6)]
OTHERS = [make_record(f"other{idx}") for idx in range(6)]
"""Used in order: the chain first, so that it goes first, from its end."""
CAPACITY_BYTES = 1 << 24
Gc = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def saved(tmp_path) -> Path:
    state = open_state(tmp_path / "state", CAPACITY_BYTES, 0)
    assert all(put(state.store, record) for record in [*CHAIN, *OTHERS])
    state.transcripts.remember(b"tenant", "a text", [1, 2, 3])
    state.close()
    return tmp_path / "state"


@pytest.fixture
def gc(capsys) -> Gc:
    def run(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
        status = main(["gc", "--state-dir", str(path), "--json", *options])
        (found,) = json.loads(capsys.readouterr().out)["state_dirs"]
        return status, found

    return run


def test_pinned_contexts_stay(saved, gc):
    state = open_state(saved, CAPACITY_BYTES, 0)
    assert state.pins.pin(CHAIN[3].span_id) == 4
    state.close()
    status, found = gc(saved, "--capacity", "1", "--max-idle", "0s")
    assert status == 0 and found["expired_spans"] + found["evicted_spans"] == NUM_SPANS - 4
    assert held(saved) == [True] * 4 + [False] * (NUM_SPANS - 4)


def test_a_set_is_collected_whole_or_not_at_all(tmp_path, capsys):
    paths = [tmp_path / "one", tmp_path / "two"]
    open_state(paths, CAPACITY_BYTES, 0).close()
    assert main(["gc", "--state-dir", str(paths[0]), "--max-idle", "1d"]) == 2
    assert str(paths[1]) in capsys.readouterr().err


def held(path: Path) -> list[bool]:
    state = open_state(path, CAPACITY_BYTES, 0)
    assert state.notes == []
    found = [holds(state.store, record) for record in [*CHAIN, *OTHERS]]
    state.close()
    return found


def fingerprints(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in path.rglob("*")
        if file.is_file()
    }


def old_header(store_uuid: bytes, version: int) -> bytes:
    block = bytearray(SegmentHeader(store_uuid=store_uuid, slot_bytes=8192, num_slots=4).pack())
    struct.pack_into("<I", block, 8, version)
    return bytes(block[:-4]) + struct.pack("<I", crc32c(bytes(block[:-4])))


def litter(path: Path) -> None:
    """What crashes, updates and other stores leave."""
    store_uuid = store_uuid_in(path)
    assert store_uuid is not None
    segments = path / "segments"
    (segments / "00000021.seg").write_bytes(old_header(store_uuid, FORMAT_VERSION - 1) + b"x" * 100_000)
    (segments / "00000022.new").write_bytes(b"x" * 100_000)
    (segments / "00000023.seg").write_bytes(old_header(b"f" * 16, FORMAT_VERSION - 1))
    (segments / "00000024.seg").write_bytes(old_header(store_uuid, FORMAT_VERSION + 1))
    (segments / "00000025.seg").write_bytes(b"damaged")
    (segments / "letter.txt").write_text("hello")
    (path / "catalog.damaged-1.sqlite").write_bytes(b"x" * 9000)
    (path / "catalog.damaged-1.sqlite-wal").write_bytes(b"x")
    (path / "profile.json").write_text("{}")
    (path / (PREFIX + "dead")).mkdir()
    (path / (PREFIX + "dead") / "a").write_bytes(b"x" * 50_000)


def set_last_uses(path: Path, ages_s: dict[bytes, float]) -> None:
    connection = sqlite3.connect(path / "catalog.sqlite")
    for span_id, age_s in ages_s.items():
        tick = round((time.time() - age_s) * 1e6)
        connection.execute("UPDATE span SET last_used = ? WHERE span_id = ?", (tick, span_id))
    connection.commit()
    connection.close()


@pytest.mark.parametrize("options", [[], ["--capacity", "100K"], ["--max-idle", "1s"], ["--keep-format-old"]])
def test_a_dry_run_changes_nothing(saved, gc, options):
    litter(saved)
    set_last_uses(saved, {record.span_id: 100 for record in CHAIN})
    before = fingerprints(saved)
    status, found = gc(saved, "--dry-run", *options)
    assert status == 0 and fingerprints(saved) == before and (saved / (PREFIX + "dead")).exists()
    assert found["after_bytes"] is None and found["gain_bytes"] > 0


def test_what_nobody_needs_goes_and_all_else_stays(saved, gc):
    litter(saved)
    _, planned = gc(saved, "--dry-run")
    status, found = gc(saved)
    assert status == 0 and found["files"] == planned["files"]
    assert {file["name"] for file in found["files"]} == {
        "segments/00000021.seg",
        "segments/00000022.new",
        "catalog.damaged-1.sqlite",
        "catalog.damaged-1.sqlite-wal",
    }
    assert {path.name for path in (saved / "segments").iterdir()} == {
        "00000001.seg", "00000023.seg", "00000024.seg", "00000025.seg", "letter.txt"
    }  # fmt: skip
    assert {path.name for path in saved.iterdir()} == {
        "lock", "store.id", "catalog.sqlite",
        "pins.sqlite", "transcripts.sqlite", "segments", "profile.json"
    }  # fmt: skip
    assert found["before_bytes"] - found["after_bytes"] >= 250_000
    for name in ("00000023.seg", "00000024.seg", "00000025.seg"):
        (saved / "segments" / name).unlink()
    assert all(held(saved))


def test_old_files_may_be_kept(saved, gc):
    litter(saved)
    _, found = gc(saved, "--keep-format-old")
    assert [file["name"] for file in found["files"]] == ["segments/00000022.new"]
    assert (saved / "segments" / "00000021.seg").exists() and (saved / "catalog.damaged-1.sqlite").exists()


def test_down_to_a_capacity_a_chain_goes_from_its_end(saved, gc):
    capacity_bytes = 9 * SPAN_DISK_BYTES + 4096
    status, planned = gc(saved, "--capacity", str(capacity_bytes), "--dry-run")
    assert status == 0 and planned["evicted_spans"] == 3
    _, found = gc(saved, "--capacity", str(capacity_bytes))
    assert found["evicted_spans"] == 3 and found["before_bytes"] - found["after_bytes"] >= 3 * SPAN_DISK_BYTES
    assert held(saved) == [True] * 3 + [False] * 3 + [True] * 6
    assert disk_bytes(saved) <= capacity_bytes
    assert gc(saved, "--capacity", str(capacity_bytes))[1]["evicted_spans"] == 0, "nothing more to do"


def test_a_capacity_for_nothing_leaves_no_segment(saved, gc):
    _, found = gc(saved, "--capacity", "0")
    assert found["evicted_spans"] == NUM_SPANS and not list((saved / "segments").iterdir())
    assert not any(held(saved))


def test_what_was_not_used_for_long_goes(saved, gc):
    ages_s = {record.span_id: 3600.0 * idx for idx, record in enumerate(OTHERS)}
    set_last_uses(saved, ages_s)
    status, found = gc(saved, "--max-idle", "90m")
    assert (status, found["expired_spans"]) == (0, 4)
    assert found["notes"] == (
        [] if not _keeps_counts(saved) else ["when 6 spans were used last is not known; they stay"]
    )
    assert held(saved) == [True] * 6 + [True] * 2 + [False] * 4


def _keeps_counts(path: Path) -> bool:
    """Whether spans' last uses are counts still, and not yet times."""
    connection = sqlite3.connect(path / "catalog.sqlite")
    (tick,) = connection.execute("SELECT min(last_used) FROM span").fetchone()
    connection.close()
    return tick < 10**15


def test_free_slots_and_deleted_rows_are_given_back(saved, gc, monkeypatch):
    """Left by a server whose file system could not punch holes, or that was killed."""
    state = open_state(saved, CAPACITY_BYTES, 0)
    for idx in range(400):
        state.transcripts.remember(b"tenant", f"text {idx}", list(range(200)))
    state.transcripts.flush()
    for idx in range(400):
        state.transcripts.forget(b"tenant", f"text {idx}")
    state.close()
    connection = sqlite3.connect(saved / "catalog.sqlite")
    connection.execute("DELETE FROM span WHERE span_id = ?", (OTHERS[0].span_id,))
    connection.commit()
    connection.close()
    database_bytes = (saved / "transcripts.sqlite").stat().st_size
    _, found = gc(saved)
    assert found["free_slot_bytes"] == SPAN_DISK_BYTES
    assert disk_bytes(saved) == (NUM_SPANS - 1) * SPAN_DISK_BYTES + 4096
    assert (saved / "transcripts.sqlite").stat().st_size < database_bytes / 2
    assert main(["fsck", "--state-dir", str(saved)]) == 0
    assert held(saved) == [True] * 6 + [False] + [True] * 5


@pytest.mark.parametrize("damage", ["catalog", "segment", "no catalog"])
def test_a_damaged_directory_is_left_to_fsck(saved, capsys, damage):
    if damage == "catalog":
        (saved / "catalog.sqlite").write_bytes(b"garbage" * 1000)
    else:
        (saved / ("segments/00000001.seg" if damage == "segment" else "catalog.sqlite")).unlink()
    before = fingerprints(saved)
    assert main(["gc", "--state-dir", str(saved)]) == 2
    assert "run `python -m mii_hcache fsck` first" in capsys.readouterr().err
    assert fingerprints(saved) == before
    assert main(["fsck", "--state-dir", str(saved), "--repair"]) == 1
    assert main(["gc", "--state-dir", str(saved)]) == 0


def test_a_directory_in_use_is_refused_and_so_are_those_beside_it(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "free")
    litter(tmp_path / "free")
    state = open_state(saved, CAPACITY_BYTES, 0)
    assert main(["gc", "--state-dir", str(tmp_path / "free"), "--state-dir", str(saved)]) == 2
    assert f"in use by the server with process id {os.getpid()}" in capsys.readouterr().err
    state.close()
    assert (tmp_path / "free" / "segments" / "00000021.seg").exists()


def test_the_text_says_what_went(saved, capsys):
    litter(saved)
    assert main(["gc", "--state-dir", str(saved), "--dry-run", "--capacity", "0"]) == 0
    out = capsys.readouterr().out
    assert "12 spans would be evicted" in out and "segments/00000021.seg would be removed: it is of format" in out
    assert "nothing was changed" in out
    assert main(["gc", "--state-dir", str(saved), "--capacity", "0"]) == 0
    assert " gained; " in capsys.readouterr().out
