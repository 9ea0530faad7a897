"""The self-check passes on engines that are right, and says which row is wrong when something is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mii_hcache.__main__ import main
from mii_hcache.engine import compat
from mii_hcache.errors import HCacheError
from mii_hcache.tools import selfcheck

compat.install()  # its imports write to a stdout that is one test's own

RESTORED = ["hidden/memory", "hidden/file", "kv/memory", "kv/file"]
"""In the order of the table of methods."""
Check = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def check(tiny_model, tmp_path, capsys) -> Check:
    """Run on a tiny model; returns the exit status and the report."""

    def run(*options: str, family: str = "llama", history: str = "128") -> tuple[int, dict[str, Any]]:
        place = ["--model", str(tiny_model(family)), "--state-dir", str(tmp_path)]
        status = main(["selfcheck", *place, "--history", history, "--seconds", "1000", "--json", *options])
        assert not list(tmp_path.iterdir()), "it left something behind"
        return status, json.loads(capsys.readouterr().out)

    return run


def rows_by_way(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    assert len({row["history_tokens"] for row in report["rows"]}) == 1
    return {row["way"]: row for row in report["rows"]}


def test_float32_passes_with_a_row_for_every_way(check):
    status, report = check()
    rows = rows_by_way(report)
    assert (status, report["ok"], report["problems"]) == (0, True, [])
    assert list(rows) == ["resident", "recompute", "cold/hidden", *RESTORED]
    for way, row in rows.items():
        assert (
            row["ok"]
            and row["ttft_ms"] > 0
            and len(row["timed_runs_ms"]) in ((6, 8, 12) if way == "recompute" else (1, 3, 7))
        )
        if way != "resident":
            assert row["num_equal"] == row["num_tokens"] >= 16
            assert row["max_logit_difference"] <= row["logit_bound"]
    assert {way: rows[way]["reused_tokens"] for way in RESTORED} == dict.fromkeys(RESTORED, 128)
    assert rows["resident"]["reused_tokens"] == 128 and rows["recompute"]["reused_tokens"] == 0
    assert rows["hidden/file"]["read_bytes_per_token"] == 3 * 128 * 4  # layer 0 comes from the token ids
    assert rows["kv/file"]["read_bytes_per_token"] == 4 * 2 * 128 * 4
    assert [rows[way]["max_kv_difference"] for way in ("kv/memory", "kv/file")] == [0.0, 0.0]
    assert report["software"]["deepspeed"] and report["machine"] and report["dtype"] == "float32"


def test_sixteen_bit_is_bounded_by_the_engines_own_noise(check):
    status, report = check("--dtype", "bfloat16", family="llama-gqa", history="200")
    rows = rows_by_way(report)
    assert status == 0, report["problems"]
    assert list(rows) == ["resident", "recompute", "cold/kv", *RESTORED]
    assert 1e-3 < rows["hidden/file"]["logit_bound"] < 1, "measured, not the float32 one"
    assert {row["reused_tokens"] for way, row in rows.items() if way in RESTORED} == {192}


@pytest.mark.parametrize(
    ("fault", "way", "complaint"),
    [
        ("swap-rows", "hidden/memory", "K and V differ"),
        ("swap-rows", "kv/file", "K and V differ"),
        ("corrupt-logits", "kv/memory", "logits differ"),
    ],
)
def test_a_fault_fails_the_row_that_has_it_and_no_other(check, fault, way, complaint):
    status, report = check("--turns", "2", "--inject", f"{fault}@{way}", "--methods", way.split("/")[0])
    assert status == 1 and not report["ok"]
    assert [row["way"] for row in report["rows"] if not row["ok"]] == [way]
    assert any(problem.startswith(f"history 128, {way}: {complaint}") for problem in report["problems"])


def test_sixteen_bit_noise_hides_no_fault(check):
    status, report = check("--dtype", "bfloat16", "--turns", "2", "--inject", "swap-rows", "--methods", "hidden")
    assert status == 1
    assert [row["way"] for row in report["rows"] if not row["ok"]] == ["hidden/memory", "hidden/file"]


def test_state_that_does_not_come_back_is_a_failure(check, monkeypatch):
    monkeypatch.setattr("mii_hcache.tools.saved_state.SavedState.drain", lambda state: None)
    monkeypatch.setattr("mii_hcache.runtime.saver.Saver.end_step", lambda saver: None)
    monkeypatch.setattr("mii_hcache.runtime.saver.Saver.heal", lambda saver, uid: None)
    status, report = check("--turns", "2", "--methods", "kv")
    assert status == 1
    assert "history 128, kv/file: 0 of 128 tokens were restored (not_saved)" in report["problems"]


def test_a_restore_that_breaks_is_a_failure_and_the_check_goes_on(check, monkeypatch):
    def broken(*_: object) -> None:
        raise IndexError("no such block")

    monkeypatch.setattr("mii_hcache.engine.ragged_engine.SequenceBlocks.write_kv", broken)
    status, report = check("--turns", "2")
    assert status == 1
    assert [row["way"] for row in report["rows"] if not row["ok"]] == ["kv/memory", "kv/file"]
    assert "0 of 128 tokens were restored (IndexError: no such block)" in report["problems"][0]


def test_the_table_names_the_machine_and_the_verdict(tiny_model, tmp_path, capsys):
    options = ["--model", str(tiny_model("llama")), "--history", "128,5000", "--turns", "2", "--methods", "hidden"]
    assert main(["selfcheck", *options, "--seconds", "10"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"measured on .*threads; python .*torch .*deepspeed 0", text)
    assert re.search(r"^(64|128) +hidden/file +\1 +\d", text, re.MULTILINE)
    assert re.search(r"^\d+ +recompute .* 1\.00x ", text, re.MULTILINE)
    assert "history 5000: " in text, "it fits neither into the context of 2048 nor into the time"
    assert text.rstrip().splitlines()[-1].startswith("passed after")


def test_what_cannot_be_run_is_refused(tiny_model, tmp_path, capsys):
    model = str(tiny_model("llama"))
    for options, complaint in (
        (["--model", str(tmp_path / "nothing")], "must be a folder with a config.json"),
        (["--model", model, "--state-dir", __file__], "cannot be written"),
        (["--model", model, "--inject", "rain"], "swap-rows"),
        (["--model", model, "--turns", "200"], "take fewer"),
    ):
        assert main(["selfcheck", *options]) == 2
        out, err = capsys.readouterr()
        assert complaint in err and not out
    with pytest.raises(SystemExit) as left:
        main(["selfcheck", "--methods", "hidden,magic"])
    assert left.value.code == 2
    assert "'magic' is no method; choose from hidden, kv, recompute" in capsys.readouterr().err


def test_running_out_of_memory_is_no_traceback(tiny_model, tmp_path, monkeypatch):
    def no_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(selfcheck, "_measure", no_memory)
    with pytest.raises(HCacheError, match="shorter --history"):
        selfcheck.main(["--model", str(tiny_model("llama")), "--history", "64"])


def test_nothing_is_left_of_a_state_dir_after_a_failure(tiny_model, tmp_path):
    assert main(["selfcheck", "--model", str(tiny_model("llama")), "--state-dir", str(tmp_path), "--turns", "200"]) == 2
    assert not list(Path(tmp_path).iterdir())
