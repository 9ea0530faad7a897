"""The GPU benchmark, end to end on a CPU: its rows are well-formed, it goes on, ends in time, and judges both ways."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from experiments.common.rows import ROOT, Row, read_rows
from experiments.gpu_restore import gate, report, run, scales, soak, targets
from experiments.gpu_restore.bounds import Ceilings, work_of
from experiments.gpu_restore.ledger import (
    BEGUN,
    CELL,
    FAILED,
    SKIPPED,
    Cell,
    Deadline,
    DeviceLost,
    GateFailed,
    Ledger,
    Number,
)
from experiments.gpu_restore.rig import Rig
from experiments.gpu_restore.targets import FIRST, LONG, Numbers, verdicts
from experiments.gpu_restore.timing import Clock, quantile
from mii_hcache.core.geometry import ChunkKind, ModelGeometry
from mii_hcache.core.plans import uniform_storage
from mii_hcache.engine.ragged_engine import SequenceBlocks

pytestmark = pytest.mark.timeout(900)  # the whole benchmark runs in the first of them
SMALL = replace(
    scales.TINY,
    gate_dtypes=("bfloat16",),
    gate_tokens=192,
    gate_ragged=(65,),
    models=(replace(scales.TINY.models[0], contexts=(256,)), scales.TINY.models[1]),
    decode_batches=(1, 2),
)
ARGUMENTS = ["--device", "cpu", "--scale", "tiny", "--deadline-s", "2000"]
STAMP = Row(figure="gpu_restore", series="-", x="", y=0.0, unit="-", how="measured", machine="m", commit="c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a whole run."""
    path = tmp_path_factory.mktemp("gpu_restore")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setitem(scales.SCALES, "tiny", SMALL)
        assert run.main([*ARGUMENTS, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def rows(folder):
    return read_rows(folder / run.ROWS)


def test_every_part_leaves_rows(rows):
    panels = {row.panel.split(".")[0] for row in rows}
    wanted = {"gate", "copy", "copies", "product", "attention", "scatter", "placing", "store", "both"}
    wanted |= {"restore", "emulated", "ttft", "decode", "speed", "machine", CELL}
    assert wanted <= panels and not panels & {FAILED, SKIPPED}
    assert all(row.cell and row.machine and row.commit and row.versions["torch"] for row in rows)
    assert {row.how for row in rows if row.panel.startswith("emulated")} == {"emulated"}
    assert {row.how for row in rows if not row.panel.startswith("emulated")} == {"measured"}


def test_the_gate_compares_tokens_that_can_be_told_apart(rows):
    shares = [row.y for row in rows if row.panel == "gate.clear"]
    assert len(shares) == 2 and min(shares) > 0.25


def test_every_method_is_restored_and_timed(rows):
    numbers = Numbers(rows)
    for method in scales.METHODS:
        series = f"demo {method}"
        took_s, least_s = numbers.get("restore", series, 256), numbers.get("restore.min", series, 256)
        assert took_s and least_s and least_s <= took_s <= numbers.get("restore.p90", series, 256)
        assert numbers.get("restore.bound", series, 256) > 0
        assert numbers.get("restore.difference", series, 256) < 0.1
        assert (numbers.get("restore.read", series, 256) > 0) == (method != "recompute")
    ratio = numbers.ratio(("restore.read", "demo kv", 256), ("restore.read", "demo hidden", 256))
    assert ratio == pytest.approx(2 * 4 / 3)  # layer 0 is never stored as a hidden state
    assert numbers.get("ttft", "demo ideal", 256)
    assert all(numbers.get(f"decode{what}", "demo saving", 2) for what in ("", ".p99"))


def test_saving_was_really_on(rows):
    notes = [row.note for row in rows if row.panel == "decode" and row.series == "demo saving"]
    assert notes and all("0 rows dropped" in note and " 0 spans saved" not in note for note in notes)


def test_a_run_that_is_whole_does_nothing_when_it_is_started_again(folder, monkeypatch, capsys):
    monkeypatch.setitem(scales.SCALES, "tiny", SMALL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = (folder / run.ROWS).read_text()
    assert run.main([*ARGUMENTS, "--out", str(folder)]) == 0
    assert (folder / run.ROWS).read_text() == before
    assert "0 left" in capsys.readouterr().out


def test_the_report_comes_from_the_rows(folder, capsys):
    assert report.main(["--rows", str(folder / run.ROWS), "--out", str(folder)]) == 0
    text = (folder / "gpu_restore.md").read_text()
    assert "| demo | hidden | 256 |" in text and "**emulated**" in text and "within" not in text.split("##")[0]
    pytest.importorskip("matplotlib")
    assert {path.name for path in folder.glob("*.png")} == {"gpu_restore.png", "gpu_restore_pace.png"}


def test_without_rows_it_says_so(tmp_path):
    assert report.main(["--rows", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "gpu_restore.md").read_text()
    assert "Not yet measured" in text and "| - | not yet measured |" in text and "MISSED" not in text
    assert not list(tmp_path.glob("*.png"))


def test_a_cpus_rows_are_no_results(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RECORDED", folder / run.ROWS)
    with pytest.raises(SystemExit, match="not measured on a GPU"):
        report.main(["--rows", str(folder / run.ROWS), "--out", str(tmp_path)])


def test_what_is_recorded_here_was_measured_on_a_gpu():
    assert all("driver" in row.versions and row.versions["cuda"] != "-" for row in read_rows(report.RECORDED))


# --- the ledger -----------------------------------------------------------------------------------------------------


PROGRAM = """
import os, sys, time
from pathlib import Path
from experiments.common.rows import Row
from experiments.gpu_restore import ledger
from experiments.gpu_restore.ledger import Cell, Deadline, Ledger
STAMP = Row(figure="gpu_restore", series="-", x="", y=0.0, unit="-", how="measured", machine="m", commit="c")
"""
"""The beginning of programs that do not live to their end."""


def cell(key: str, *, expected_s: float = 0.0, is_gate: bool = False, fails: bool = False, log: list[str]) -> Cell:
    def measure() -> Iterator[Number]:
        log.append(key)
        yield Number(panel="p", series=key, x=1, y=2.0, unit="s")
        if fails:
            raise GateFailed("wrong bits") if is_gate else RuntimeError("no memory")

    return Cell(key=key, model="", expected_s=expected_s, measure=measure, is_gate=is_gate)


def go(path, cells, total_s=1000.0) -> tuple[Ledger, int]:
    ledger = Ledger(path, STAMP)
    return ledger, ledger.run(cells, Deadline(total_s=total_s), lambda words: None)


def test_what_does_not_fit_before_the_deadline_is_said_and_done_by_the_next_run(tmp_path):
    path, log = tmp_path / "rows.jsonl", []
    cells = [cell("a", log=log), cell("long", expected_s=50, log=log), cell("b", log=log)]
    ledger, _ = go(path, cells, total_s=40.0)
    assert log == ["a", "b"]
    (skipped,) = [row for row in ledger.rows if row.panel == SKIPPED]
    assert skipped.series == "long" and "it takes about 50" in skipped.note
    ledger, _ = go(path, cells)
    assert log == ["a", "b", "long"] and ledger.done == {"a", "b", "long"}
    assert not [row for row in read_rows(path) if row.panel == SKIPPED]


def test_nothing_starts_after_the_deadline(tmp_path):
    log = []
    ledger, _ = go(tmp_path / "rows.jsonl", [cell("a", log=log)], total_s=-1.0)
    assert log == [] and [row.panel for row in ledger.rows] == [SKIPPED]


def test_a_cell_that_was_cut_off_is_measured_again(tmp_path):
    path, log = tmp_path / "rows.jsonl", []
    cells = [cell("a", log=log), cell("b", log=log)]
    go(path, cells)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
    ledger, _ = go(path, cells)
    assert log == ["a", "b", "b"]
    assert [row.series for row in read_rows(path) if row.panel == "p"] == ["a", "b"] and ledger.done == {"a", "b"}


def test_a_failed_cell_fails_alone_and_is_tried_again(tmp_path):
    path, log = tmp_path / "rows.jsonl", []
    ledger, num_failed = go(path, [cell("a", fails=True, log=log), cell("b", log=log)])
    assert num_failed == 1 and ledger.done == {"b"}
    assert [row.note for row in read_rows(path) if row.panel == FAILED] == ["RuntimeError: no memory"]
    assert not [row for row in read_rows(path) if row.panel == "p" and row.series == "a"]
    ledger, num_failed = go(path, [cell("a", log=log)])
    assert num_failed == 0 and ledger.done == {"a", "b"}


def test_what_failed_once_comes_last_in_the_next_run(tmp_path):
    path, log = tmp_path / "rows.jsonl", []
    go(path, [cell("gate", is_gate=True, log=log), cell("a", fails=True, log=log), cell("b", expected_s=2000, log=log)])
    log.clear()
    go(path, [cell("gate", is_gate=True, log=log), cell("a", log=log), cell("b", log=log)])
    assert log == ["b", "a"]


def test_so_does_what_ended_its_process_but_a_gate_stays_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    program = f"""{PROGRAM}
cells = [Cell(key="first", model="", expected_s=0, measure=list)]
cells.append(Cell(key=sys.argv[2], model="", expected_s=0, measure=lambda: os._exit(9)))
Ledger(Path(sys.argv[1]), STAMP).run(cells, Deadline(total_s=9), print)
"""
    for key, order in (("dies", ["b", "dies"]), ("gate", ["gate", "b"])):
        done = subprocess.run([sys.executable, "-c", program, str(path), key], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 9, done.stderr
        assert (tmp_path / BEGUN).read_text() == key
        log = []
        go(path, [cell(key, is_gate=key == "gate", log=log), cell("first", log=log), cell("b", log=log)])
        assert log == order and not (tmp_path / BEGUN).exists()
        path.unlink()


def test_a_cell_that_hangs_ends_the_process_and_says_where(tmp_path):
    program = f"""{PROGRAM}
ledger.HANG_S = 0.5
def stuck(): time.sleep(600)
cells = [Cell(key="stuck", model="", expected_s=0, measure=stuck)]
Ledger(Path(sys.argv[1]), STAMP).run(cells, Deadline(total_s=9), print, ends_hanging=True)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1 and "in stuck" in done.stderr
    assert (tmp_path / BEGUN).read_text() == "stuck"


def test_a_failed_cell_is_cleared_away_when_its_error_is_gone(tmp_path):
    """What the frames of an error hold is the device's memory."""
    held, seen = [], []

    class Engine:
        pass

    def measure() -> Iterator[Number]:
        engine = Engine()
        held.append(weakref.ref(engine))
        raise RuntimeError("no memory")

    def recover() -> None:
        gc.collect()
        seen.append(held[0]())
        raise DeviceLost("gone")

    ledger = Ledger(tmp_path / "rows.jsonl", STAMP)
    cells = [Cell(key="a", model="", expected_s=0, measure=measure), cell("b", log=seen)]
    with pytest.raises(DeviceLost):
        ledger.run(cells, Deadline(total_s=9), lambda words: None, recover=recover)
    assert seen == [None] and ledger.failed == set()


def test_nothing_is_timed_behind_a_gate_that_failed(tmp_path):
    log = []
    with pytest.raises(GateFailed):
        go(tmp_path / "rows.jsonl", [cell("gate", is_gate=True, fails=True, log=log), cell("a", log=log)])
    assert log == ["gate"]


@pytest.mark.parametrize("changes", [{"machine": "another"}, {"commit": "another"}, {"versions": {"torch": "1"}}])
def test_rows_of_two_machines_or_commits_do_not_mix(tmp_path, changes):
    path = tmp_path / "rows.jsonl"
    go(path, [cell("a", log=[])])
    before = path.read_text()
    with pytest.raises(ValueError, match="give another file"):
        Ledger(path, replace(STAMP, **changes))
    assert path.read_text() == before


def test_rows_are_on_disk_before_the_next_cell_begins(tmp_path):
    path, seen = tmp_path / "rows.jsonl", []

    def look() -> Iterator[Number]:
        seen.append([json.loads(line)["series"] for line in path.read_text().splitlines()])
        yield Number(panel="p", series="b", x=1, y=1.0, unit="s")

    go(path, [cell("a", log=[]), Cell(key="b", model="", expected_s=0, measure=look)])
    assert seen == [["a", "a"]]


# --- the gate and the soak ------------------------------------------------------------------------------------------


def shifted(self, layer_idx, start, hidden):
    """A row too far: what a wrong slot, or a copy that came too early, looks like."""
    genuine(self, layer_idx, start, hidden.roll(1, 0))


genuine = SequenceBlocks.project_hidden


def test_the_gate_sees_rows_in_the_wrong_place(monkeypatch):
    monkeypatch.setattr(SequenceBlocks, "project_hidden", shifted)
    with pytest.raises(GateFailed, match=r"hidden: logits differ"):
        list(gate.check(SMALL.models[0], SMALL, "bfloat16"))


def test_the_gate_sees_nan(monkeypatch):
    monkeypatch.setattr(SequenceBlocks, "write_kv", lambda self, layer_idx, start, kv, stream: None)
    with pytest.raises(GateFailed, match=r"kv: logits differ by inf"):
        list(gate.check(SMALL.models[0], SMALL, "bfloat16"))


@pytest.mark.parametrize("num_layers", [3, 4, 32])
def test_every_way_of_the_gate_stores_something_and_brings_all_back(num_layers):
    for name, (storage, recompute_tokens, recompute_layers) in gate.ways(num_layers, 2048).items():
        assert len(storage.kinds) == num_layers and any(storage.kinds), name
        assert all(storage.kinds[recompute_layers:]) and recompute_tokens % 64 == 0, name
    with pytest.raises(ValueError, match="three layers"):
        gate.ways(2, 2048)


def test_the_gpu_tests_gate_models_that_it_can():
    """They run nowhere but on a GPU."""
    from tests.gpu import test_engine

    for model in test_engine.MODELS.values():
        assert gate.ways(model.gate_layers, test_engine.SCALE.gate_tokens)
        assert model.pool_tokens >= 2 * max(model.contexts) and model.pool_tokens % test_engine.SCALE.block_size == 0


def test_noise_that_is_not_finite_fails_the_gate(monkeypatch):
    """It would excuse anything."""
    monkeypatch.setattr(gate, "noise_of", lambda runs: float("inf"))
    with pytest.raises(GateFailed, match="own logits are not finite"):
        list(gate.check(SMALL.models[0], SMALL, "bfloat16"))


def test_the_gate_sees_k_and_v_that_no_logit_tells_of(monkeypatch):
    """Two tokens with each other's values in one layer, of a history that logits hardly depend on."""

    def swapped(self, layer_idx, start, hidden):
        genuine(self, layer_idx, start, hidden)
        if layer_idx == self._engine.geometry.num_layers - 2:
            rows, slots = self._rows(layer_idx), self._all_slots
            rows[slots[3:5], 1] = rows[slots[3:5].flip(0), 1]

    monkeypatch.setattr(SequenceBlocks, "project_hidden", swapped)
    with pytest.raises(GateFailed, match=r"K and V that came back as hidden are not within"):
        list(gate.check(SMALL.models[0], SMALL, "bfloat16"))


def test_the_gate_ends_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(scales.SCALES, "tiny", SMALL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(SequenceBlocks, "project_hidden", shifted)
    assert run.main([*ARGUMENTS, "--out", str(tmp_path)]) == 2
    assert "nothing was timed" in capsys.readouterr().out
    assert {row.panel for row in read_rows(tmp_path / run.ROWS)} == {"machine", CELL, FAILED}


def test_the_soak_goes_on_where_it_was(tmp_path, capsys):
    out = tmp_path / "soak.jsonl"
    arguments = ["--scale", "tiny", "--out", str(out), "--cycles"]
    assert soak.main([*arguments, "20"]) == 0
    assert "20 of 20 cycles, all right" in capsys.readouterr().out
    assert soak.main([*arguments, "20"]) == 0 and len(out.read_text().splitlines()) == 1
    assert soak.main([*arguments, "1000", "--deadline-s", "0"]) == 0
    assert "the time is over" in capsys.readouterr().out


def test_the_soak_sees_rows_in_the_wrong_place(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(SequenceBlocks, "project_hidden", shifted)
    assert soak.main(["--scale", "tiny", "--cycles", "20", "--out", str(tmp_path / "soak.jsonl")]) == 1
    assert "WRONG: by" in capsys.readouterr().out


# --- bounds, targets, clocks ----------------------------------------------------------------------------------------

SEVEN = ModelGeometry(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    dtype="bfloat16",
    ffn_weights=3 * 4096 * 11008,
)
TOKENS = 1024


def work(**changes):
    none = {"read_bytes": 0, "hidden_rows": 0, "recompute_tokens": 0, "recompute_layers": 0}
    return work_of(SEVEN, num_tokens=TOKENS, **{**none, **changes})


def test_a_bound_is_the_longer_of_copying_and_computing():
    ceilings = Ceilings(copy_bytes_per_s=50e9, product_flop_per_s=700e12, attention_flop_per_s=400e12)
    hidden = work(read_bytes=31 * TOKENS * 8192, hidden_rows=31 * TOKENS, recompute_layers=1)
    assert hidden.product_flop == 32 * TOKENS * 4 * 4096**2 and hidden.attention_flop == 0
    assert ceilings.bound_s(hidden) == pytest.approx(31 * TOKENS * 8192 / 50e9)
    slow = replace(ceilings, product_flop_per_s=1e12)
    assert slow.bound_s(hidden) == pytest.approx(hidden.product_flop / 1e12)


def test_a_prefill_is_all_weights_and_half_the_pairs():
    found = work(is_prefill=True)
    assert found.product_flop == pytest.approx(2 * TOKENS * 32 * (4 * 4096**2 + 3 * 4096 * 11008))
    assert found.attention_flop == pytest.approx(32 * 4 * 4096 * TOKENS * (TOKENS + 1) / 2)
    leading, whole = work(recompute_tokens=256), work(recompute_tokens=TOKENS)
    assert 0 < leading.product_flop < whole.product_flop < found.product_flop
    layers = work(recompute_layers=3)
    assert layers.attention_flop == pytest.approx(2 * 4 * 4096 * TOKENS * (TOKENS + 1) / 2)


def test_without_its_peaks_there_is_no_bound():
    peaks = [("copy", "host to device", 5e10), ("product", "m", 7e14), ("attention", "torch", 4e14)]
    numbers = [replace(STAMP, panel=panel, series=series, x=1, y=y) for panel, series, y in peaks]
    assert Ceilings.of(Numbers(numbers), "m").copy_bytes_per_s == 5e10
    assert Ceilings.of(Numbers(numbers), "m", 7e9).copy_bytes_per_s == 7e9
    assert Ceilings.of(Numbers(numbers[:2]), "m") is None and Ceilings.of(Numbers(numbers), "other") is None


def synthetic(*, auto_s: float, bound_s: float, saving: float) -> list[Row]:
    """Of an H200 that never was."""

    def one(panel: str, series: str, x: float, y: float) -> Row:
        return replace(STAMP, panel=panel, series=series, x=x, y=y)

    found = []
    for model in (FIRST, "llama2-13b", "llama3-8b"):
        for method, took_s in (("auto", auto_s), ("hidden", auto_s), ("kv", 0.2), ("cake", 0.15), ("recompute", 0.5)):
            for stage in ("restore", "ttft"):
                found.append(one(stage, f"{model} {method}", LONG, took_s))
            found.append(one("restore.bound", f"{model} {method}", LONG, bound_s))
    for batch in (1, 8, 32):
        found += [one("decode", f"{FIRST} alone", batch, 0.01), one("decode", f"{FIRST} saving", batch, 0.01 * saving)]
    return found


def test_targets_are_met_and_missed():
    met = verdicts(synthetic(auto_s=0.1, bound_s=0.095, saving=1.009))
    assert met and {one.word for one in met} == {"met"}
    missed = verdicts(synthetic(auto_s=0.15, bound_s=0.095, saving=1.03))
    assert {one.word for one in missed} == {"missed"} and len(missed) == len(met)
    edge = [one for one in verdicts(synthetic(auto_s=0.1, bound_s=0.095, saving=1.015)) if "saving" in one.target]
    assert [one.word for one in edge] == ["met", "missed", "missed"]  # 2 % at batch 1, 1 % from 8
    assert {one.word for one in verdicts([])} == {"not yet measured"}
    assert len({one.target for one in met}) == len(targets.TARGETS)


def test_the_report_prints_verdicts_beside_predictions():
    text = report.markdown(synthetic(auto_s=0.15, bound_s=0.095, saving=1.0))
    assert "| 1.579 | MISSED |" in text and "| met |" in text
    assert f"| {FIRST} | auto | 16,384 | 73.8 | 112 | 150.0 | 1.34 |" in text


def test_things_take_turns_and_long_ones_are_repeated_less(monkeypatch):
    clock = Clock(torch.device("cpu"), 4096)
    log: list[str] = []
    took_s = {"short": 0.001, "long": 2.0}
    monkeypatch.setattr(clock, "once", lambda work: (took_s[str(work())],) * 2)

    def note(name: str) -> str:
        log.append(name)
        return name

    found = clock.race({name: lambda name=name: note(name) for name in took_s}, 10)
    assert log[:3] == ["short", "short", "long"]  # warm-ups, one of them for what takes long
    assert log[3:7] == ["short", "long", "long", "short"]
    assert len(found["short"].host_s) == 10 and len(found["long"].host_s) == 3


def test_a_history_is_saved_once_for_all_who_restore_it():
    rig = Rig(SMALL.models[0], SMALL)
    try:
        storages = {kind.value: uniform_storage(rig.geometry, kind) for kind in ChunkKind}
        first = rig.saved(256, {"hidden": storages["hidden"]})
        num_saved = rig.counters.get("saved_spans_total")
        both = rig.saved(256, storages)
        assert both["hidden"] is first["hidden"]
        assert rig.counters.get("saved_spans_total") == 2 * num_saved and num_saved == 4
        assert rig.saved(256, storages) == both and rig.counters.get("saved_spans_total") == 2 * num_saved
        rig.store.delete([both["kv"].records[1].span_id])  # as a store does that is full
        again = rig.saved(256, storages)
        assert rig.counters.get("saved_spans_total") == 2 * num_saved + 1
        assert all(rig.store.find(record.span_id) for record in again["kv"].records)
        assert rig.engine.num_free_blocks == rig.engine.num_blocks
    finally:
        rig.close()


def test_what_was_not_used_for_longest_makes_room():
    rig = Rig(SMALL.models[0], replace(SMALL, store_bytes=1400 << 10))
    try:
        kv = {"kv": uniform_storage(rig.geometry, ChunkKind.KV)}
        for num_tokens in (64, 128, 64, 192):  # of 4 KiB
            rig.saved(num_tokens, kv)
        found = {length for length, _ in rig._kept}
        assert found == {64, 192}
        assert rig.store.stats().num_bytes <= 0.85 * (1400 << 10) and rig.store.stats().evicted_spans == 0
    finally:
        rig.close()


def test_an_engine_leaves_the_device_when_its_rig_is_closed():
    """Else two of them would have to fit."""
    rig = Rig(SMALL.models[0], SMALL)
    uid = rig.new_uid()
    histories, _ = rig.save(uid, rig.tokens(256, 1), {"kv": uniform_storage(rig.geometry, ChunkKind.KV)})
    rig.engine.evict(uid)
    rig.restore(rig.new_uid(), histories["kv"], rig.choose(rig.policy("kv", rig.costs), histories["kv"]))
    engine = weakref.ref(rig.engine)
    rig.close()
    assert engine() is None


def test_quantiles_are_values_that_were_seen():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and quantile([1.0, 2.0], 0.99) == 2.0 and quantile([1.0], 0.5) == 1.0
