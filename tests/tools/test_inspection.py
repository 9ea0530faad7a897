"""What `inspect` says of a directory that a real engine filled: sound, damaged, in use, or none at all."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mii_hcache.__main__ import main
from mii_hcache.engine import compat
from mii_hcache.storage.open import OpenedState, open_state
from mii_hcache.tools import state_view
from tests.engine_kit import VOCAB, open_client, poisoned_engine
from tests.storage.storage_kit import MIXED, make_record, put

compat.install()  # its imports write to a stdout that is one test's own

SHARED = random.Random(1).choices(range(3, VOCAB), k=130)
PROMPTS = [SHARED + random.Random(seed).choices(range(3, VOCAB), k=length) for seed, length in ((2, 200), (3, 400))]
"""Two contexts with two spans in common: 330 and 530 tokens, 5 and 8 spans."""
SPAN_BYTES = 3 * 64 * 128 * 4
ROOT = Path(__file__).resolve().parents[2]
Inspect = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def filled(tiny_model, tmp_path_factory) -> Path:
    """A state directory as a server leaves it. Not to be changed."""
    path = tmp_path_factory.mktemp("filled") / "state"
    state = open_state(path, 256 << 20, 64 << 20)
    client = open_client(poisoned_engine(tiny_model("llama"), num_blocks=200), store=state.store, keep="none")
    for prompt in PROMPTS:
        client.ask(prompt, 2)
    client.service.close()
    state.transcripts.remember(b"tenant", "a text", [1, 2, 3])
    state.close()
    return path


@pytest.fixture
def state_dir(filled, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(filled, tmp_path / "state"))


@pytest.fixture
def opened(state_dir) -> Iterator[OpenedState]:
    """A server's storage on the copy."""
    state = open_state(state_dir, 256 << 20, 0)
    yield state
    state.close()


@pytest.fixture
def inspect(capsys) -> Inspect:
    def run(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
        status = main(["inspect", str(path), "--json", *options])
        return status, json.loads(capsys.readouterr().out)

    return run


def segment_of(path: Path) -> Path:
    (segment,) = (path / "segments").glob("*.seg")
    return segment


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def fingerprints(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything in a directory: names, times, bytes."""
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.stat().st_size, file.read_bytes())
        for file in path.rglob("*")
        if file.is_file()
    }


def test_a_filled_directory(filled, inspect):
    before = fingerprints(filled)
    status, report = inspect(filled, "--verify", "--spans")
    assert fingerprints(filled) == before
    assert status == 0 and not report["problems"] and not report["notes"]
    assert report["owner"] is None and report["format_version"] == 2
    assert report["store_uuid"].replace("-", "") == (filled / "store.id").read_text()
    assert report["kinds"] == {"hidden": {"num_spans": 11, "num_bytes": 11 * SPAN_BYTES}}
    assert report["num_transcripts"] == 1
    assert [(one["num_tokens"], one["num_bytes"], one["own_bytes"]) for one in report["contexts"]] == [
        (8 * 64, 8 * SPAN_BYTES, 6 * SPAN_BYTES),
        (5 * 64, 5 * SPAN_BYTES, 3 * SPAN_BYTES),
    ]
    assert [one["use_rank"] for one in report["contexts"]] == [1, 2], "the one used last first"
    (segment,) = report["segments"]
    assert (segment["num_used"], segment["num_free"], segment["slot_bytes"]) == (33, 0, 4096 + 64 * 128 * 4)
    assert len(report["spans"]) == 11 and report["spans"][0]["first_token"] == 0
    assert report["spans"][0]["kinds"] == [None, "hidden", "hidden", "hidden"]
    assert report["spans"][0]["chunk_bytes"] == {"hidden": SPAN_BYTES // 3}
    assert report["verified"] == {"num_chunks": 33, "num_bytes": 11 * SPAN_BYTES, "damaged": []}


def test_the_text_says_the_same(filled, capsys):
    assert main(["inspect", str(filled), "--verify", "--spans"]) == 0
    text = capsys.readouterr().out
    assert "no server uses it" in text and "11 spans of 64 tokens, 1.0 MiB: 11 hidden (1.0 MiB)" in text
    assert "2 contexts" in text and "1 transcripts" in text and "00000001.seg" in text
    assert "verified 33 chunks, 1.0 MiB: 0 damaged" in text


@pytest.mark.parametrize(
    ("where", "reason"),
    [(4096 + 4096 + 100, "wrong checksum"), (4096 + 60, "slot header: wrong checksum")],
    ids=["payload", "slot header"],
)
def test_a_damaged_chunk_is_found_and_named(state_dir, inspect, capsys, where, reason):
    slot_bytes = 4096 + 64 * 128 * 4
    flip(segment_of(state_dir), 7 * slot_bytes + where)
    status, report = inspect(state_dir)
    assert status == 0, "without --verify no chunk is read"
    status, report = inspect(state_dir, "--verify")
    (damage,) = report["verified"]["damaged"]
    assert (status, damage["place"], damage["reason"]) == (1, {"segment": 1, "slot": 7}, reason)
    assert main(["inspect", str(state_dir), "--verify"]) == 1
    assert f"DAMAGED  span {damage['span_id'][:16]} layer {damage['layer_idx']} (segment 1, slot 7)" in (
        capsys.readouterr().out
    )


def test_spans_of_two_kinds(tmp_path, inspect, capsys):
    state = open_state(tmp_path / "state", 1 << 24, 0)
    records = [make_record(idx, layout=MIXED) for idx in range(3)] + [make_record("plain")]
    assert all(put(state.store, record) for record in records)
    state.close()
    status, report = inspect(tmp_path / "state", "--verify", "--spans")
    assert (status, report["verified"]["num_chunks"], report["verified"]["damaged"]) == (0, 12, [])
    assert report["kinds"] == {
        "hidden+kv": {"num_spans": 3, "num_bytes": 45_000},
        "hidden": {"num_spans": 1, "num_bytes": 15_000},
    }
    span = next(span for span in report["spans"] if span["span_id"] == records[0].span_id.hex())
    assert span["kinds"] == [None, "hidden", "kv", None, "hidden"]
    assert (span["num_chunks"], span["num_bytes"], span["segments"]) == (3, 15_000, [1, 2])
    assert span["chunk_bytes"] == {"hidden": 1000, "kv": 13_000}
    assert {tuple(context["kinds"]) for context in report["contexts"]} == {("hidden", "kv"), ("hidden",)}
    flip(tmp_path / "state" / "segments" / "00000002.seg", 4096 + 4096 + 12_999)
    status, report = inspect(tmp_path / "state", "--verify")
    (damage,) = report["verified"]["damaged"]
    assert (status, damage["layer_idx"], damage["reason"]) == (1, 2, "wrong checksum")
    main(["inspect", str(tmp_path / "state"), "--spans"])
    text = capsys.readouterr().out
    assert "3 hidden+kv (43.9 KiB)" in text and "hidden 2 + kv 1" in text


def test_a_segment_that_ends_early_or_is_gone(state_dir, inspect):
    os.truncate(segment_of(state_dir), 100_000)
    status, report = inspect(state_dir, "--verify")
    assert status == 1 and len(report["verified"]["damaged"]) == 31, "two slots are whole"
    segment_of(state_dir).unlink()
    status, report = inspect(state_dir)
    assert status == 1 and report["problems"] == ["11 spans lie in segment files that are gone or unreadable"]


def test_a_damaged_catalog_is_told_and_left_alone(state_dir, inspect):
    flip(state_dir / "catalog.sqlite", 30)
    before = fingerprints(state_dir)
    status, report = inspect(state_dir, "--verify")
    assert status == 1 and report["num_spans"] == 0
    assert "the catalog cannot be used (" in report["problems"][0] and "set aside" not in report["problems"][0]
    assert fingerprints(state_dir) == before
    (state_dir / "catalog.sqlite").unlink()
    assert "the catalog is missing" in inspect(state_dir)[1]["problems"][0]


def test_what_is_not_ours_or_of_no_use_is_a_note(state_dir, inspect):
    shutil.copy(segment_of(state_dir), state_dir / "segments" / "foreign.seg")
    (state_dir / "catalog.damaged-1.sqlite").write_bytes(b"x")
    status, report = inspect(state_dir)
    assert status == 0 and [note.split()[0] for note in report["notes"]] == ["foreign.seg", "catalog.damaged-1.sqlite"]


def test_several_directories_are_shown_one_after_another(state_dir, tmp_path, inspect, capsys):
    open_state([state_dir, tmp_path / "other"], 256 << 20, 0).close()
    status, report = inspect(state_dir, str(tmp_path / "other"))
    assert status == 0
    assert [one["num_spans"] for one in report] == [11, 0]
    flip(segment_of(state_dir), 4096 + 5)
    assert main(["inspect", str(tmp_path / "other"), str(state_dir), "--verify"]) == 1
    assert str(tmp_path / "other") in capsys.readouterr().out


def test_a_directory_in_use_is_read_and_not_disturbed(state_dir, opened, inspect):
    mine = str(os.getpid())
    before = fingerprints(state_dir / "segments"), (state_dir / "catalog.sqlite").read_bytes()
    status, report = inspect(state_dir, "--verify")
    assert (status, report["owner"], report["num_spans"]) == (0, mine, 11)
    assert (fingerprints(state_dir / "segments"), (state_dir / "catalog.sqlite").read_bytes()) == before
    span_ids = [bytes.fromhex(span["span_id"]) for span in inspect(state_dir, "--spans")[1]["spans"]]
    opened.store.delete(span_ids[-1:])
    opened.store.flush()
    assert inspect(state_dir)[1]["num_spans"] == 10, "what is only in the log counts"


def test_a_span_deleted_while_it_is_verified_is_no_damage(state_dir, opened, inspect, monkeypatch):
    from mii_hcache.tools import verification

    read_rows = verification.read_rows

    def delete_first(view: Any) -> Any:
        opened.store.delete([row.record.span_id for row in view.rows if row.places[0].slot < 3])
        opened.store.flush()
        return read_rows(view)

    flip(segment_of(state_dir), 4096 + 4096 + 5)  # of the first span, which the server forgets just then
    monkeypatch.setattr(verification, "read_rows", delete_first)
    status, report = inspect(state_dir, "--verify")
    assert (status, report["verified"]["damaged"]) == (0, [])
    flip(segment_of(state_dir), 4096 + 20 * (4096 + 64 * 128 * 4) + 5000)  # of another one, which stays
    assert inspect(state_dir, "--verify")[0] == 1


def test_a_context_without_its_beginning_is_cut_off(state_dir, inspect, capsys):
    state = open_state(state_dir, 256 << 20, 0)
    first = next(span for span in inspect(state_dir, "--spans")[1]["spans"] if span["first_token"] == 0)
    state.store.delete([bytes.fromhex(first["span_id"])])
    state.close()
    status, report = inspect(state_dir)
    assert status == 0 and [context["first_token"] for context in report["contexts"]] == [64, 64]
    main(["inspect", str(state_dir)])
    assert "cut off: spans before token 64 are missing" in capsys.readouterr().out


def test_directories_that_hold_nothing(tmp_path, inspect, capsys):
    (tmp_path / "empty").mkdir()
    status, report = inspect(tmp_path / "empty", "--verify")
    assert (status, report["num_spans"], report["contexts"]) == (0, 0, [])
    main(["inspect", str(tmp_path / "empty")])
    assert "nothing is saved here" in capsys.readouterr().out
    open_state(tmp_path / "fresh", 1 << 24, 0).close()
    assert inspect(tmp_path / "fresh", "--verify")[0] == 0
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("hello")
    for name, complaint in (("missing", "is no directory"), ("other", "is no state directory")):
        assert main(["inspect", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert complaint in err and not out


def test_a_log_that_a_crash_left_is_read_too(state_dir, inspect):
    """What a killed server committed last lies in the log beside the database."""
    state = open_state(state_dir, 256 << 20, 0)
    gone = [span["span_id"] for span in inspect(state_dir, "--spans")[1]["spans"]][-2:]
    state.store.delete([bytes.fromhex(span_id) for span_id in gone])
    state.store.flush()
    crashed = Path(shutil.copytree(state_dir, state_dir.parent / "crashed"))
    state.close()
    assert (crashed / "catalog.sqlite-wal").stat().st_size > 0
    before = fingerprints(crashed)
    status, report = inspect(crashed, "--verify")
    assert (status, report["owner"], report["num_spans"]) == (0, None, 9)
    assert fingerprints(crashed) == before


def test_a_log_that_its_server_puts_away_meanwhile_is_missed_by_nobody(state_dir, inspect, monkeypatch):
    """A server that stops just now closes its databases, and their logs are gone."""
    found = state_view.databases_in

    def find_and_put_away(directory: Path) -> list[Path]:
        (directory / "catalog.sqlite-wal").touch()
        paths = found(directory)
        (directory / "catalog.sqlite-wal").unlink()
        assert any(path.name.endswith("-wal") for path in paths)
        return paths

    monkeypatch.setattr(state_view, "databases_in", find_and_put_away)
    status, report = inspect(state_dir)
    assert (status, report["num_spans"]) == (0, 11)


def test_as_a_process(filled):
    command = [sys.executable, "-m", "mii_hcache", "inspect", str(filled), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_spans"] == 11
