"""HCache against K and V offload: the arithmetic of its verdict, and a small run from end to end."""

from __future__ import annotations

import json

import pytest

from experiments import compare_attentionstore as compare
from experiments.common.checkpoints import SHAPES
from experiments.common.random_weights import random_engine
from experiments.common.reference import Ratio, Reference, median_ratio
from mii_hcache.engine.ragged_engine import token_tensors


def test_the_interval_holds_the_ratio_and_widens_with_noise():
    quiet = median_ratio([2.0, 2.01, 1.99, 2.0, 2.02], [1.0, 1.01, 0.99, 1.0, 1.0])
    noisy = median_ratio([2.0, 3.0, 1.0, 2.0, 2.5], [1.0, 1.6, 0.6, 1.0, 0.8])
    assert quiet.value == pytest.approx(2.0) and quiet.low <= quiet.value <= quiet.high
    assert noisy.high - noisy.low > 5 * (quiet.high - quiet.low)
    assert median_ratio([3.0] * 5, [1.0] * 5) == Ratio(value=3.0, low=3.0, high=3.0)
    with pytest.raises(ValueError, match="as many turns"):
        median_ratio([1.0], [])


def test_turns_are_drawn_together():
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratio = median_ratio([2 * one for one in drifting], drifting)
    assert (ratio.low, ratio.high) == (2.0, 2.0)


ABOUT = {"how": "measured", "repeats": 5, "versions": {}, "commit": "abc", "date": "2026-11-21"}


def test_a_reference_is_found_by_all_of_its_key(tmp_path):
    file = tmp_path / "reference.json"
    key = Reference(device="card", model="7b float16", store="memory", file=file)
    assert key.judge(1024, Ratio(value=0.1, low=0.1, high=0.1))[0] is False
    key.record(file, 1024, Ratio(value=1.7, low=1.6, high=1.8), ABOUT)
    key.record(file, 4096, Ratio(value=1.9, low=1.9, high=1.9), ABOUT)
    assert key.recorded(1024) == {"ratio": 1.7, "noise": 0.1, **ABOUT}
    assert Reference(device="card", model="7b float16", store="file", file=file).recorded(1024) is None
    is_slower, words = key.judge(1024, Ratio(value=1.5, low=1.4, high=1.59))
    assert is_slower and "Slower than recorded" in words
    assert key.judge(1024, Ratio(value=1.5, low=1.3, high=1.61))[0] is False
    assert key.judge(1024, Ratio(value=9.0, low=9.0, high=9.0))[0] is False


@pytest.mark.parametrize("argv", [["--history", "100"], ["--repeats", "4"], ["--read-speed", "0"]])
def test_what_cannot_be_compared_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        compare.parse(argv)
    assert argv[0] in capsys.readouterr().err


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_model):
    """One run that records: its folder, and the table that it printed."""
    folder = tmp_path_factory.mktemp("compare")
    argv = ["--model", str(tiny_model("llama")), "--history", "192", "--record", str(folder / "reference.json")]
    assert compare.main([*argv, "--json", str(folder / "out.json"), "--table", str(folder / "out.md")]) == 0
    return folder, argv[:4]


def test_a_run_says_what_it_was(found):
    folder, _ = found
    body = json.loads((folder / "out.json").read_text())
    (result,) = body["results"]
    ways = result["ways"]
    assert body["how"] == "measured" and set(ways) == {"kv", "hcache", "auto"}
    assert all(len(way["ttft_s"]) == 5 and min(way["ttft_s"]) > 0 for way in ways.values())
    assert ways["kv"]["came_back"] == "kv" and ways["kv"]["bytes_per_token"] == 4 * 2 * 128 * 4
    assert result["ttft"]["low"] <= result["ttft"]["value"] <= result["ttft"]["high"]
    table = (folder / "out.md").read_text()
    assert body["device"] in table and body["versions"]["torch"] in table and "**measured**" in table
    assert "| 192 | kv | 4KV | 4,096 |" in table


def test_the_check_fails_on_a_reference_that_is_too_high(found, tmp_path):
    folder, argv = found
    reference = json.loads((folder / "reference.json").read_text())
    ((device, models),) = reference.items()
    ((model, lengths),) = models.items()
    for ratio, status in ((1000.0, 1), (0.001, 0)):
        lengths["192"]["memory"].update(ratio=ratio, noise=0.0001)
        file = tmp_path / "made-up.json"
        file.write_text(json.dumps({device: {model: lengths}}))
        assert compare.main([*argv, "--check", "--reference", str(file)]) == status


def test_nothing_recorded_is_no_failure_and_throttled_is_emulated(found, tmp_path, capsys):
    _, argv = found
    told = tmp_path / "told.md"
    more = ["--store", "file", "--state-dir", str(tmp_path), "--read-speed", "200", "--check", "--table", str(told)]
    assert compare.main([*argv, *more, "--reference", str(tmp_path / "none.json")]) == 0
    assert "Nothing is recorded for 192 tokens" in told.read_text() and "**emulated**" in told.read_text()
    assert "file at 200 MB/s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [told]


def test_weights_that_never_were_a_file():
    def logits(seed: int) -> list[float]:
        engine = random_engine("demo", dtype="float32", num_blocks=16, seed=seed)
        assert engine.geometry.num_layers == SHAPES["demo"]["num_hidden_layers"]
        return engine.put([1], token_tensors([[5, 6, 7]]))[0].tolist()

    assert logits(0) == logits(0) != logits(1)
    from deepspeed.inference.v2.checkpoint import HuggingFaceCheckpointEngine

    assert HuggingFaceCheckpointEngine.__name__ == "HuggingFaceCheckpointEngine"  # the reader is DeepSpeed's again
