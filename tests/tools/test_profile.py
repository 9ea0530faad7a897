"""A profile is measured, kept, shown, and planned with."""

from __future__ import annotations

import json

import pytest

from mii_hcache.__main__ import main
from mii_hcache.config import HCacheConfig
from mii_hcache.core.cost import MeasuredProfile
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.engine.demo_model import ensure_demo_model
from mii_hcache.engine.measuring import measured_profile
from mii_hcache.engine.open import open_service
from mii_hcache.storage.state_dir import PROFILE_FILE, StateDir
from tests.engine_kit import Client, poisoned_engine

BRIEF = ["--read-mib", "1", "--repeats", "1"]


def test_a_profile_is_kept_and_planned_with(tiny_model, tmp_path, capsys):
    model, state_dir = str(tiny_model("llama")), str(tmp_path / "state")
    assert main(["profile", "--model", model, "--state-dir", state_dir, *BRIEF]) == 0
    assert "one layer, 1,024 tokens, ms" in capsys.readouterr().out
    kept = MeasuredProfile.from_json((tmp_path / "state" / PROFILE_FILE).read_text())
    assert list(kept.tiers) == ["memory", "file"]
    for cost in kept.tiers.values():
        assert cost.io_hidden_s > 0 and cost.io_kv_s > 0 and cost.c_hidden_s > 0 and cost.c_token_s > 0
    assert sorted(path.name for path in (tmp_path / "state").iterdir() if path.name.startswith("profile")) == [
        PROFILE_FILE
    ], "the scratch state was left behind"
    assert main(["plan", "--model", model, "--state-dir", state_dir, "--tokens", "1024", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["makespan_s"] > 0
    assert main(["doctor", "--state-dir", state_dir, "--json"]) in (0, 1)
    (finding,) = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["name"] == "profile"]
    assert finding["state"] == "ok" and kept.date[:10] in finding["reason"]


def test_ranks_are_measured_together_for_a_server_over_as_many(tmp_path, capsys):
    model, state_dir = str(ensure_demo_model(tmp_path / "demo-model")), tmp_path / "state"
    arguments = ["profile", "--model", model, "--state-dir", str(state_dir), "--tensor-parallel", "2", *BRIEF]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    kept = MeasuredProfile.from_json((state_dir / PROFILE_FILE).read_text())
    assert kept.machine.endswith(", 2 ranks") and list(kept.tiers) == ["file"]
    assert 0 < kept.tiers["file"].c_gather_s <= kept.tiers["file"].c_hidden_s
    assert "gather rows from all ranks" in out
    config = HCacheConfig(model=model, state_dir=str(state_dir), tensor_parallel=2, kv_blocks=200)
    opened = open_service(config)
    try:
        assert kept.date[:10] in opened.why_method
        assert MeasuredProfile.from_json((state_dir / PROFILE_FILE).read_text()) == kept, "measured again"
    finally:
        opened.close()


def test_json_is_what_is_kept(tiny_model, tmp_path, capsys):
    arguments = ["profile", "--model", str(tiny_model("llama")), "--state-dir", str(tmp_path / "state"), *BRIEF]
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert MeasuredProfile.from_json(out) == MeasuredProfile.from_json((tmp_path / "state" / PROFILE_FILE).read_text())


def test_a_directory_in_use_is_not_measured(tiny_model, tmp_path, capsys):
    state_dir = StateDir(tmp_path / "state")
    try:
        assert main(["profile", "--model", str(tiny_model("llama")), "--state-dir", str(tmp_path / "state")]) == 2
    finally:
        state_dir.close()
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["machine", "model", "garbage", "version"])
def test_a_profile_of_something_else_is_measured_anew(tiny_model, tmp_path, other, monkeypatch):
    engine = poisoned_engine(tiny_model("llama"))
    brief = {"io_bytes": 1 << 20, "repeats": 1}
    first = measured_profile(engine, [tmp_path], b"one", **brief)
    assert measured_profile(engine, [tmp_path], b"one", **brief) == first, "measured twice"
    fingerprint = b"one"
    path = tmp_path / PROFILE_FILE
    if other == "machine":
        monkeypatch.setattr("mii_hcache.engine.measuring.machine_of", lambda engine: "a quantum computer")
    elif other == "model":
        fingerprint = b"two"
    elif other == "garbage":
        path.write_text(path.read_text()[:-40])
    else:
        path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    again = measured_profile(engine, [tmp_path], fingerprint, **brief)
    assert again.tiers != first.tiers
    assert MeasuredProfile.from_json(path.read_text()) == again
    assert engine.num_free_blocks == engine.num_blocks and engine.num_tracked == 0


def test_an_emulated_disk_is_profiled_as_such_and_is_not_this_machines(tiny_model, tmp_path):
    engine = poisoned_engine(tiny_model("llama"))
    brief = {"io_bytes": 1 << 18, "repeats": 1}
    rate = 1e6
    slow = measured_profile(engine, [tmp_path], b"one", emulated_read_bytes_per_s=rate, **brief)
    row_bytes = engine.geometry.row_bytes(ChunkKind.KV)
    for cost in slow.tiers.values():  # others may be at work, and the machine stand still for seconds
        assert row_bytes / rate <= cost.io_kv_s < 30 * row_bytes / rate
    fast = measured_profile(engine, [tmp_path], b"one", **brief)
    assert "emulated at 1 MB/s" in slow.machine and "emulated" not in fast.machine
    assert fast.tiers["memory"].io_kv_s < slow.tiers["memory"].io_kv_s


def test_a_server_reads_as_slowly_as_it_is_told(tmp_path):
    rate = 1e6
    config = HCacheConfig(
        state_dir=str(tmp_path / "state"),
        method="kv",
        keep="none",
        emulated_read_bytes_per_s=rate,
    )
    opened = open_service(config)
    try:
        assert any("1 MB/s" in note and "emulated" in note for note in opened.notes)
        history = list(range(5, 5 + 128))
        client = Client(opened.service)
        client.ask(history, 1)
        opened.service.drain_saves()
        report = client.ask([*history, 9], 1).report
        least_s = 128 * opened.service.geometry.bytes_per_token(ChunkKind.KV) / rate
        assert report.restored_tokens == 128 and report.restore_ms >= 1e3 * least_s
    finally:
        opened.close()
