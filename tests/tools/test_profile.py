"""A profile is measured, kept, shown, and planned with."""

from __future__ import annotations

import json

import pytest

from mii_hcache.__main__ import main
from mii_hcache.core.cost import MeasuredProfile
from mii_hcache.engine.measuring import measured_profile
from mii_hcache.storage.state_dir import PROFILE_FILE, StateDir
from tests.engine_kit import poisoned_engine

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
    first = measured_profile(engine, tmp_path, b"one", **brief)
    assert measured_profile(engine, tmp_path, b"one", **brief) == first, "measured twice"
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
    again = measured_profile(engine, tmp_path, fingerprint, **brief)
    assert again.tiers != first.tiers
    assert MeasuredProfile.from_json(path.read_text()) == again
    assert engine.num_free_blocks == engine.num_blocks and engine.num_tracked == 0
