"""`fsck` finds each kind of damage, and `--repair` forgets that and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mii_hcache.__main__ import main
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.storage.format import SegmentHeader
from mii_hcache.storage.open import open_state
from tests.storage.storage_kit import SLOT_BYTES, holds, make_record, put

RECORDS = [
    make_record(idx, kind=ChunkKind.KV if idx % 2 else ChunkKind.HIDDEN, **({"chunk_bytes": 900} if idx > 7 else {}))
    for idx in range(10)
]
"""Spans of two sizes, so two segments."""
CAPACITY_BYTES = 1 << 24
Fsck = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def saved(tmp_path) -> Path:
    state = open_state(tmp_path / "state", CAPACITY_BYTES, 0)
    assert all(put(state.store, record) for record in RECORDS)
    state.transcripts.remember(b"tenant", "a text", [1, 2, 3])
    state.close()
    return tmp_path / "state"


@pytest.fixture
def fsck(capsys) -> Fsck:
    def run(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
        status = main(["fsck", "--state-dir", str(path), "--json", *options])
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] == (status == 0)
        (found,) = report["state_dirs"]
        return status, found

    return run


def segment_of(path: Path, number: int = 1) -> Path:
    return path / "segments" / f"{number:08d}.seg"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def alter(path: Path, sql: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(sql)
    connection.commit()
    connection.close()


def fingerprints(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in path.rglob("*")
        if file.is_file()
    }


def survivors(path: Path) -> list[int]:
    """Which of RECORDS a server would serve; it finds nothing wrong, or the test fails."""
    state = open_state(path, CAPACITY_BYTES, 0)
    found = [idx for idx, record in enumerate(RECORDS) if holds(state.store, record)]
    assert state.store.stats().corrupt_chunks == 0 and state.notes == []
    state.close()
    return found


def lies_at(idx: int, chunk: int = 0) -> int:
    """Offset of a chunk's slot: spans were put in order, those of 5000 bytes into the first segment."""
    return 4096 + (3 * idx + chunk) * SLOT_BYTES


def test_a_sound_directory_is_clean_and_not_changed(saved, fsck, capsys):
    before = fingerprints(saved)
    status, found = fsck(saved)
    assert (status, found["problems"], found["damaged"], found["notes"]) == (0, [], [], [])
    assert (found["num_spans"], found["num_chunks"], found["num_transcripts"]) == (10, 30, 1)
    assert found["segment_bytes"] > 0 and found["database_bytes"] > 0 and found["unreferenced_bytes"] == 0
    assert fingerprints(saved) == before
    status, found = fsck(saved, "--repair")
    assert (status, found["repairs"]) == (0, []) and fingerprints(saved) == before, "nothing to do"
    assert main(["fsck", "--state-dir", str(saved)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "clean"


@pytest.mark.parametrize(
    ("offset", "reason"),
    [(4096 + 2500, "wrong checksum"), (40, "slot header: wrong checksum"), (4096 + 4999, "wrong checksum")],
    ids=["payload", "header", "last payload byte"],
)
def test_a_damaged_chunk_is_found_and_its_span_alone_forgotten(saved, fsck, capsys, offset, reason):
    flip(segment_of(saved), lies_at(3, 1) + offset)
    before = fingerprints(saved)
    status, found = fsck(saved)
    (damage,) = found["damaged"]
    assert (status, damage["reason"], damage["span_id"]) == (1, reason, RECORDS[3].span_id.hex())
    assert fingerprints(saved) == before
    assert main(["fsck", "--state-dir", str(saved)]) == 1 and "DAMAGED   span" in capsys.readouterr().out
    status, found = fsck(saved, "--repair")
    assert status == 1 and found["repairs"] == ["1 spans with damaged or lost chunks were forgotten"]
    assert fsck(saved)[0] == 0
    assert survivors(saved) == [idx for idx in range(10) if idx != 3]


def test_padding_may_be_damaged(saved, fsck):
    flip(segment_of(saved), lies_at(3) + 4096 + 5001)
    assert fsck(saved)[0] == 0


@pytest.mark.parametrize("num_bytes", [0, 4095, 4096, 8192, 3 * SLOT_BYTES, 20 * SLOT_BYTES + 7])
def test_truncated_segments(saved, fsck, num_bytes):
    os.truncate(segment_of(saved), num_bytes)
    whole = [idx for idx in range(8) if lies_at(idx, 2) + 4096 + 5000 <= num_bytes]
    status, found = fsck(saved, "--repair")
    assert status == 1 and {damage["span_id"] for damage in found["damaged"]} == {
        record.span_id.hex() for idx, record in enumerate(RECORDS[:8]) if idx not in whole
    }
    after = fsck(saved)[1]
    assert not after["damaged"], "what was damaged is forgotten"
    if num_bytes >= 4096:
        assert not after["problems"] and survivors(saved) == [*whole, 8, 9]
    else:
        assert ["is no segment file" in problem for problem in after["problems"]] == [True], "whose it is nobody knows"


def test_a_lost_segment(saved, fsck):
    segment_of(saved).unlink()
    status, found = fsck(saved, "--repair")
    assert status == 1 and found["problems"] == ["8 spans lie in segment files that are gone or unreadable"]
    assert found["repairs"] == ["8 spans with damaged or lost chunks were forgotten"]
    assert fsck(saved)[0] == 0 and survivors(saved) == [8, 9]


@pytest.mark.parametrize("garbage", [b"", b"\0" * 8192, b"not a database, honestly" * 999, b"SQLite format 3\0"])
def test_a_garbage_catalog_is_set_aside(saved, fsck, garbage):
    (saved / "catalog.sqlite").write_bytes(garbage)
    status, found = fsck(saved)
    assert status == 1 and "the catalog cannot be used" in found["problems"][0]
    assert (saved / "catalog.sqlite").read_bytes() == garbage
    assert "set aside as catalog.damaged-1.sqlite" in fsck(saved, "--repair")[1]["repairs"][0]
    status, found = fsck(saved)
    assert status == 0 and found["num_spans"] == 0 and any("holds nothing" in note for note in found["notes"])
    assert survivors(saved) == []


ALL = list(range(10))


@pytest.mark.parametrize(
    ("sql", "why", "kept"),
    [
        ("DROP TABLE span", "tables", []),
        ("CREATE TRIGGER t AFTER INSERT ON span BEGIN DELETE FROM span; END", "tables", ALL),
        ("ALTER TABLE span ADD COLUMN more", "tables", ALL),
        ("PRAGMA user_version = 3", "format version 3", []),
        ("DELETE FROM store", "rows but no identity", ALL),
        ("UPDATE store SET uuid = randomblob(16)", "another store", ALL),
        ("UPDATE span SET token_ids = zeroblob(256) WHERE rowid = 3", "checksum", [0, 1, *ALL[3:]]),
        ("UPDATE span SET places = x'00' WHERE rowid = 3", "checksum", [0, 1, *ALL[3:]]),
        ("UPDATE span SET kinds = 3 WHERE rowid = 3", "malformed", [0, 1, *ALL[3:]]),
        ("UPDATE span SET last_used = 'never' WHERE rowid = 3", "checksum", [0, 1, *ALL[3:]]),
    ],
)
def test_of_a_catalog_that_makes_no_sense_the_sound_rows_are_kept(saved, fsck, sql, why, kept):
    alter(saved / "catalog.sqlite", sql)
    status, found = fsck(saved)
    assert status == 1 and why in found["problems"][0]
    assert fsck(saved, "--repair")[0] == 1
    status, found = fsck(saved)
    assert (status, found["num_spans"]) == (0, len(kept))
    assert survivors(saved) == kept


def test_no_old_row_brings_deleted_bytes_back(saved, fsck):
    """A catalog from before a deletion: its rows are sound, and what they name is gone or somebody else's."""
    old = (saved / "catalog.sqlite").read_bytes()
    state = open_state(saved, CAPACITY_BYTES, 0)
    state.store.delete([RECORDS[2].span_id, RECORDS[5].span_id])
    state.store.flush()
    assert put(state.store, RECORDS[2], 7)
    state.close()
    (saved / "catalog.sqlite").write_bytes(old)
    alter(saved / "catalog.sqlite", "UPDATE store SET uuid = x'00'")
    status, found = fsck(saved, "--repair")
    assert status == 1 and found["repairs"][1] == "8 spans of the old catalog are sound and were taken over"
    assert fsck(saved)[0] == 0 and survivors(saved) == [idx for idx in ALL if idx not in (2, 5)]


def test_a_lost_catalog_and_a_lost_identity(saved, fsck, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    (saved / "catalog.sqlite").unlink()
    status, found = fsck(saved)
    assert status == 1 and "the catalog is missing" in found["problems"][0]
    assert fsck(saved, "--repair")[0] == 1 and fsck(saved)[0] == 0
    (tmp_path / "copy" / "store.id").unlink()
    status, found = fsck(tmp_path / "copy")
    assert status == 0 and "store.id is missing" in found["notes"][0]
    assert survivors(tmp_path / "copy") == list(range(10))


def test_segments_without_catalog_and_identity_keep_their_chance(saved, fsck):
    """A new identity would make them another store's."""
    (saved / "store.id").unlink()
    catalog = (saved / "catalog.sqlite").read_bytes()
    (saved / "catalog.sqlite").unlink()
    assert fsck(saved, "--repair")[0] == 1
    (saved / "catalog.sqlite").write_bytes(catalog)  # found in a backup
    assert fsck(saved)[0] == 0 and survivors(saved) == list(range(10))


def test_damaged_transcripts(saved, fsck):
    alter(saved / "transcripts.sqlite", "UPDATE transcript SET num_chars = 'many'")
    status, found = fsck(saved)
    assert status == 1 and "the transcripts cannot be used" in found["problems"][0]
    assert "transcripts.sqlite cannot be used" in fsck(saved, "--repair")[1]["repairs"][0]
    assert fsck(saved)[0] == 0 and survivors(saved) == list(range(10))


def test_stale_segments_under_a_newer_catalog(saved, fsck, tmp_path):
    shutil.copytree(saved / "segments", tmp_path / "old")
    state = open_state(saved, CAPACITY_BYTES, 0)
    state.store.delete([RECORDS[2].span_id])
    state.store.flush()
    assert put(state.store, RECORDS[2], 7)  # the same name and slots, other bytes
    state.close()
    shutil.rmtree(saved / "segments")
    shutil.copytree(tmp_path / "old", saved / "segments")
    status, found = fsck(saved, "--repair")
    assert status == 1 and {damage["span_id"] for damage in found["damaged"]} == {RECORDS[2].span_id.hex()}
    assert all("holds generation" in damage["reason"] for damage in found["damaged"])
    assert survivors(saved) == [idx for idx in range(10) if idx != 2]


def test_files_that_are_not_segments_are_named_and_left_alone(saved, fsck):
    foreign = SegmentHeader(store_uuid=b"f" * 16, slot_bytes=8192, num_slots=1).pack()
    strangers = {"00000007.seg": foreign, "readme.txt": b"hello", "00000008.new": b"half a head", "x.seg": b"hello"}
    for name, content in strangers.items():
        (saved / "segments" / name).write_bytes(content)
    status, found = fsck(saved, "--repair")
    assert status == 0 and {file["name"]: file["state"] for file in found["other_files"]} == {
        "00000007.seg": "foreign",
        "00000008.new": "unfinished",
        "readme.txt": "foreign",
        "x.seg": "foreign",
    }
    for name, content in strangers.items():
        assert (saved / "segments" / name).read_bytes() == content


def test_what_the_disk_does_not_give_is_told_and_kept(saved, fsck, monkeypatch):
    from mii_hcache.storage import disk_io

    real = disk_io.read_all

    def failing(fd: int, buffers: Any, offset: int) -> bool:
        if offset == lies_at(3, 1) and os.readlink(f"/proc/self/fd/{fd}").endswith("00000001.seg"):
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(disk_io, "read_all", failing)
    status, found = fsck(saved, "--repair")
    assert status == 1 and found["repairs"] == []
    assert [(damage["is_unread"], damage["reason"]) for damage in found["damaged"]] == [
        (True, "[Errno 5] Input/output error")
    ]
    monkeypatch.undo()
    assert survivors(saved) == list(range(10))


@pytest.mark.parametrize("options", [[], ["--repair"]])
def test_a_directory_in_use_is_refused(saved, capsys, options):
    state = open_state(saved, CAPACITY_BYTES, 0)
    assert main(["fsck", "--state-dir", str(saved), *options]) == 2
    out, err = capsys.readouterr()
    assert f"in use by the server with process id {os.getpid()}" in err and not out
    state.close()


def test_what_is_no_state_directory_is_refused(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("hello")
    for path, complaint in ((tmp_path, "is no state directory"), (tmp_path / "none", "is no directory")):
        assert main(["fsck", "--state-dir", str(path)]) == 2
        assert complaint in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_several_directories_are_as_bad_as_the_worst(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "other")
    flip(segment_of(tmp_path / "other"), lies_at(3) + 5000)
    directories = ["--state-dir", str(saved), "--state-dir", str(tmp_path / "other")]
    assert main(["fsck", "--json", *directories]) == 1
    assert [found["ok"] for found in json.loads(capsys.readouterr().out)["state_dirs"]] == [True, False]
