"""`bench storage` on a few MiB: numbers that can be true, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from mii_hcache.__main__ import main
from mii_hcache.errors import ConfigError
from mii_hcache.storage import copying
from mii_hcache.storage.native import why_no_uring
from mii_hcache.storage.open import open_state
from mii_hcache.tools import device_passes
from mii_hcache.tools import scratch as scratch_module
from mii_hcache.tools.cost import Cost, Median
from mii_hcache.tools.device_passes import Files, make_files
from mii_hcache.tools.scratch import leftovers, scratch, sweep
from tests.storage.storage_kit import holds, make_record, put

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--bytes", "4M", "--seconds", "0.5", "--chunk-bytes", "16K", "512K", "--queue-depth", "1", "4"]


def bench(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    status = main(["bench", "storage", "--json", *TINY, *options])
    return status, json.loads(capsys.readouterr().out)


def test_the_numbers_are_sane_and_saved_state_is_untouched(tmp_path, capsys):
    state = open_state(tmp_path / "state", 1 << 24, 0)
    record = make_record("saved")
    assert put(state.store, record)
    state.close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}
    status, report = bench(capsys, "--state-dir", str(tmp_path / "state"), "--repeats", "1")
    assert status == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()} == before
    backends = {"threads", *(["uring"] if why_no_uring() is None else []), *(["fio"] if report["fio"] else [])}
    for found in report["state_dirs"]:
        rows = [row for row in found["rows"] if row["what"] == "device"]
        plain = {
            (row["backend"], row["side"], row["chunk_bytes"], row["queue_depth"])
            for row in rows
            if not row["checksums"]
        }
        assert plain == {
            (backend, side, *shape)
            for backend in backends
            for side in ("read", "write")
            for shape in ((16 << 10, 4), (512 << 10, 4), (512 << 10, 1))
        }
        assert {row["backend"] for row in rows if row["checksums"]} == backends - {"fio"}
        stores = {(row["backend"], row["side"]) for row in found["rows"] if row["what"] == "store"}
        assert stores == {(backend, side) for backend in backends - {"fio"} for side in ("read", "write")}
    assert {row["backend"] for row in report["memory"]} == {"memcpy", "copier", "memory", "crc32c"}
    for row in [row for found in report["state_dirs"] for row in found["rows"]] + report["memory"]:
        assert 0 < row["gb_per_s"] < 1000 and 0 <= row["cpu_s_per_gb"] < 1000 and row["passes"] >= 1, row
        assert row["iops"] == pytest.approx(row["gb_per_s"] * 1e9 / row["chunk_bytes"], rel=0.02, abs=0.2)
    reopened = open_state(tmp_path / "state", 1 << 24, 0)
    assert holds(reopened.store, record)
    reopened.close()


def test_several_directories_one_after_the_other(tmp_path, capsys):
    directories = [str(tmp_path), str(tmp_path / "not" / "yet")]
    options = ["--no-fio", "--io", "threads", "--queue-depth", "1", "--chunk-bytes", "64K", "--repeats", "1"]
    status, report = bench(capsys, *(word for path in directories for word in ("--state-dir", path)), *options)
    assert status == 0 and [found["state_dir"] for found in report["state_dirs"]] == directories
    first, second = ([(row["what"], row["side"]) for row in found["rows"]] for found in report["state_dirs"])
    assert first == second and len(first) == 6
    assert not list(tmp_path.iterdir())


def test_the_text_names_every_way(tmp_path, capsys):
    status = main(["bench", "storage", "--state-dir", str(tmp_path), *TINY[:4], "--chunk-bytes", "64K", "--no-fio"])
    out = capsys.readouterr().out
    assert status == 0 and "threads + checksums" in out and "memcpy" in out and "without fio" in out
    assert not list(tmp_path.iterdir())


def test_without_the_native_engine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mii_hcache.tools.bench.why_no_uring", lambda: "no compiler")
    monkeypatch.setattr(copying, "why_not_built", lambda: "no compiler")
    monkeypatch.setattr(copying, "_shared", [])
    status, report = bench(capsys, "--state-dir", str(tmp_path), "--no-fio")
    assert status == 0 and report["notes"] == [
        "uring was not measured: no compiler",
        "copies in DRAM are Python's, one at a time: the native engine was not built",
    ]
    assert {row["backend"] for row in report["state_dirs"][0]["rows"]} == {"threads"}
    assert main(["bench", "storage", "--state-dir", str(tmp_path), "--io", "uring"]) == 2
    assert "--io uring cannot be had: no compiler" in capsys.readouterr().err


def test_where_memory_may_not_be_locked_and_files_not_be_read_directly(tmp_path, capsys, monkeypatch):
    if (why := why_no_uring()) is not None:
        pytest.skip(why)
    monkeypatch.setattr(device_passes, "may_register", lambda: False)
    monkeypatch.setattr("mii_hcache.tools.bench.may_register", lambda: False)
    monkeypatch.setattr(device_passes, "takes_direct", lambda path: False)
    status, report = bench(capsys, "--state-dir", str(tmp_path), "--io", "uring")
    assert status == 0 and [note.split(":")[0] for note in report["notes"] if "fio is" not in note] == [
        "memory could not be registered with the ring (`ulimit -l`)",
        f"the file system of {tmp_path} has no direct I/O",
    ]
    assert {row["backend"] for row in report["state_dirs"][0]["rows"]} == {"uring"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--bytes", "900TiB"], "are wanted; give a smaller --bytes"),
        (["--chunk-bytes", "5000"], "multiples of 4096"),
        (["--bytes", "4096"], "--bytes must be at least"),
        (["--queue-depth", "0"], "--queue-depth must be"),
        (["--seconds", "0"], "--seconds must be > 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, capsys, options, complaint):
    assert main(["bench", "storage", "--state-dir", str(tmp_path), *options]) == 2
    out, err = capsys.readouterr()
    assert complaint in err and not out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(tmp_path, number):
    command = [sys.executable, "-m", "mii_hcache", "bench", "storage", "--state-dir", str(tmp_path / "state")]
    process = subprocess.Popen(
        [*command, "--seconds", "60", "--bytes", "8M"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background jobs ignore interrupts
    )
    try:
        deadline_s = time.monotonic() + 60
        while not list(tmp_path.glob("state/.scratch-*/b")):
            assert time.monotonic() < deadline_s and process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "state").exists()


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path):
    dead = tmp_path / (scratch_module.PREFIX + "dead")
    dead.mkdir()
    (dead / "a").write_bytes(b"x")
    with scratch(tmp_path, 1) as folder:
        assert not dead.exists() and folder.stat().st_mode & 0o777 == 0o700
        assert leftovers(tmp_path) == [], "its owner lives"
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_user_is_left_alone(tmp_path, monkeypatch):
    theirs, left = (tmp_path / (scratch_module.PREFIX + name) for name in ("theirs", "left"))
    theirs.mkdir()
    left.mkdir()
    look = os.open

    def deny(path: Path, *arguments: Any, **settings: Any) -> int:
        if path == theirs:
            raise PermissionError("Permission denied")
        return look(path, *arguments, **settings)

    monkeypatch.setattr(scratch_module.os, "open", deny)
    assert leftovers(tmp_path) == [left]
    sweep(tmp_path)
    assert theirs.exists() and not left.exists()


def test_who_sweeps_while_another_begins_takes_no_folder_that_is_used(tmp_path, monkeypatch):
    """Two at once in one directory: the folder is made, and swept away before it is locked."""
    make, made = tempfile.mkdtemp, []

    def make_and_be_swept(**where: Any) -> str:
        made.append(make(**where))
        if len(made) == 1:
            sweep(tmp_path)
        return made[-1]

    monkeypatch.setattr(scratch_module.tempfile, "mkdtemp", make_and_be_swept)
    with scratch(tmp_path, 1) as folder:
        sweep(tmp_path)
        assert folder.is_dir() and [str(folder)] == made[1:]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_goes_while_it_is_looked_at_is_nobodys_trouble(tmp_path, monkeypatch):
    (tmp_path / (scratch_module.PREFIX + "short-lived")).mkdir()
    look = os.open

    def go_and_look(path: Path, flags: int) -> int:
        if "short-lived" in str(path) and path.exists():
            path.rmdir()
        return look(path, flags)

    monkeypatch.setattr(scratch_module.os, "open", go_and_look)
    assert leftovers(tmp_path) == []


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError), scratch(tmp_path / "file", 1):
        pass


@pytest.mark.parametrize("is_write", [False, True])
@pytest.mark.parametrize("backend", ["uring", "threads"])
def test_a_pass_without_a_limit_moves_every_byte_once(tmp_path, backend, is_write):
    if backend == "uring" and (why := why_no_uring()) is not None:
        pytest.skip(why)
    paths = [tmp_path / "a", tmp_path / "b"]
    make_files(paths, 300_000)
    before = [path.read_bytes() for path in paths]
    files = Files(paths=paths, file_bytes=300_000, chunk_bytes=16 << 10)
    cost = getattr(device_passes, backend)(files, is_write=is_write, queue_depth=3, checksums=True)
    assert cost.num_bytes == files.num_bytes == 2 * 18 * (16 << 10)
    written = b"\7" * (18 * (16 << 10))
    assert [path.read_bytes() for path in paths] == [
        (written + old[len(written) :]) if is_write else old for old in before
    ]


def test_medians_and_units():
    costs = [Cost(num_bytes=10**9, wall_s=wall_s, cpu_s=cpu_s) for wall_s, cpu_s in ((1, 3), (2, 1), (4, 2))]
    assert Median.of(costs) == Median(gb_per_s=0.5, cpu_s_per_gb=2, passes=3, spread=4)
