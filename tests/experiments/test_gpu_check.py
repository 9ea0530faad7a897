"""`scripts/gpu_check.sh` around an interpreter that only pretends: what it asks for, what it says, how it ends."""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from experiments.common.rows import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.sh"
PRETENDER = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in
    *"-m pytest"*) echo "3 passed in 1 s"; exit "${PYTEST:-0}" ;;
    *"-m experiments.gpu_restore.run"*)
        echo "[gpu_restore] 7 cells done"
        case "${BENCH:-0}" in
            dies) if [ -e "$OUT/died" ]; then rm -f "$OUT/begun"; exit 0; fi
                touch "$OUT/died"; printf hung >"$OUT/begun"; exit 1 ;;
            keeps-dying) printf restore/64 >"$OUT/begun"; exit 139 ;;
            *) exit "${BENCH:-0}" ;;
        esac ;;
    *"-m experiments.gpu_restore.report"*)
        printf '## Targets\\n\\n| a target | met |\\n\\n## Next\\n' >"$OUT/gpu_restore.md"; exit "${REPORT:-0}" ;;
    *"-c import torch, sys"*) exit "${NO_GPU:-0}" ;;
    *"-c import numpy"*) exit "${LACKS:-0}" ;;
    *"-c from mii"*) ;;
    *"-c import xdist"*) exit "${NO_XDIST:-0}" ;;
    "- "*lib) exec "$REAL" "$@" ;;
    *) cat >/dev/null ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    """`check(*options, **environment)`: the finished process; what was called is in `check.calls()`."""
    pretender, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    pretender.write_text(PRETENDER)
    pretender.chmod(0o755)

    def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        calls.write_text("")
        settings = {"MII_HCACHE_PYTHON": str(pretender), "CALLS": str(calls), "OUT": str(out), "REAL": sys.executable}
        command = [str(SCRIPT), "--out", str(out), "--wheelhouse", str(tmp_path / "none"), *options]
        settings |= {"PATH": "/usr/bin:/bin", **environment}
        return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=250)

    run.calls = lambda: calls.read_text().splitlines()
    run.out = out
    return run


def test_it_runs_tests_then_the_benchmark_then_the_report(check):
    begin_s = time.monotonic()
    done = check("--deadline-s", "300")
    took_s = time.monotonic() - begin_s
    assert done.returncode == 0, done.stderr
    modules = [call.split("-m ")[1].split()[0] for call in check.calls() if "-m " in call]
    assert modules == ["pytest", "experiments.gpu_restore.run", "experiments.gpu_restore.report"]
    tests, benchmark, report = (call for call in check.calls() if "-m " in call)
    assert tests.endswith("tests/gpu tests/storage/gpu/test_cufile.py::test_on_a_gpu")
    deadline_s = float(benchmark.split("--deadline-s ")[1])
    assert 280 - took_s - 1 <= deadline_s <= 280 and "--device" not in benchmark and "--only" not in benchmark
    assert f"--out {check.out}" in benchmark and f"--rows {check.out}/rows.jsonl" in report
    for line in ("gpu_check: tests: 3 passed", "gpu_check: benchmark: 7 cells done", "| a target | met |"):
        assert line in done.stdout


def test_results_are_few_and_scratch_is_elsewhere(check, tmp_path):
    assert check("--scratch", str(tmp_path / "scratch")).returncode == 0
    found = {path.name for path in check.out.iterdir()}
    assert found == {"setup.log", "tests.log", "benchmark.log", "gpu_restore.md"}  # beside what the others would write
    assert (tmp_path / "scratch" / "report.log").is_file()


def test_several_tests_at_once_only_with_xdist(check):
    check(NO_XDIST="1")
    (tests,) = (call for call in check.calls() if "-m pytest" in call)
    assert " -n " not in tests and "--timeout 90" in tests and "xdist" not in tests


def test_a_benchmark_that_died_is_started_again_and_that_is_said(check):
    done = check(BENCH="dies")
    assert sum("gpu_restore.run" in call for call in check.calls()) == 2
    assert "ended with status 1 under hung; it goes on with the others" in done.stdout
    assert done.returncode == 1 and "benchmark: started 2 times" in done.stdout and "cut off" not in done.stdout


def test_but_not_for_ever(check):
    done = check(BENCH="keeps-dying")
    assert sum("gpu_restore.run" in call for call in check.calls()) == 4
    assert done.returncode == 1 and "restore/64 was cut off" in done.stdout


def test_nor_when_there_is_no_time(check):
    check("--deadline-s", "50", BENCH="keeps-dying")
    assert sum("gpu_restore.run" in call for call in check.calls()) == 1


def test_quick_and_dry(check):
    done = check("--quick", "--dry-run", NO_GPU="1")
    assert done.returncode == 0 and "nothing of this is a result" in done.stdout
    (benchmark,) = (call for call in check.calls() if "gpu_restore.run" in call)
    assert "--device cpu --scale tiny --only gate --only ceilings" in benchmark


@pytest.mark.parametrize(
    ("broken", "status", "words"),
    [
        ({"PYTEST": "1"}, 1, "tests: FAILED"),
        ({"BENCH": "1"}, 1, "benchmark: FAILED with status 1"),
        ({"BENCH": "2"}, 2, "benchmark: WRONG: 7 cells done"),
        ({"PYTEST": "1", "BENCH": "2"}, 2, "benchmark: WRONG"),
        ({"REPORT": "1"}, 1, "report: FAILED"),
        ({"LACKS": "1"}, 3, "--make-wheelhouse"),
        ({"NO_GPU": "1"}, 3, "torch sees no GPU"),
    ],
)
def test_the_exit_status_says_what_went_wrong(check, broken, status, words):
    done = check(**broken)
    assert done.returncode == status and words in done.stdout + done.stderr


def test_a_test_that_failed_does_not_keep_the_benchmark_from_running(check):
    check(PYTEST="1")
    assert any("gpu_restore.run" in call for call in check.calls())


def test_wheels_are_added_for_this_run_and_nothing_is_installed(check, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/__init__.py", "x = 1\n")
        wheel.writestr("thing-1.data/purelib/thing/more.py", "y = 2\n")
        wheel.writestr("thing-1.data/scripts/thing", "no\n")
    assert check("--wheelhouse", str(wheels)).returncode == 0
    lib = check.out / "scratch" / "lib"
    assert sorted(str(path.relative_to(lib)) for path in lib.rglob("*") if path.is_file()) == [
        "thing/__init__.py",
        "thing/more.py",
        "wheels.txt",
    ]
    assert not any("pip" in call for call in check.calls())


def test_unknown_options_and_help(check):
    assert check("--frobnicate").returncode == 3
    done = check("--help")
    assert done.returncode == 0 and "--make-wheelhouse DIR" in done.stdout and "set -euo" not in done.stdout


def test_what_the_wheelhouse_leaves_out_is_pinned_elsewhere_or_no_longer():
    """Names in `left_out` are those of constraints.txt: a typing error would carry a package along."""
    text = SCRIPT.read_text(encoding="utf-8")
    left_out = set(text.split('left_out="')[1].split('"')[0].split())
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert left_out <= pinned and "torch" in left_out
    kept = pinned - left_out
    assert {"deepspeed", "deepspeed-mii", "transformers", "crc32c", "pytest", "pytest-timeout", "hypothesis"} <= kept
    assert Path(SCRIPT).stat().st_mode & 0o111
