"""`plan`: from configs of real models alone, on platforms that ship and on profiles from files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mii_hcache.__main__ import main
from mii_hcache.core.cost import LayerCost, MeasuredProfile
from mii_hcache.core.geometry import DTYPE_BYTES
from mii_hcache.core.methods import METHODS
from mii_hcache.core.platforms import PLATFORMS
from mii_hcache.engine import compat
from mii_hcache.engine.config_geometry import dtype_of_config, geometry_of_config, read_config
from mii_hcache.errors import ConfigError
from mii_hcache.storage.state_dir import PROFILE_FILE
from mii_hcache.tools.profiles import load_profile

compat.install()  # its imports write to a stdout that is one test's own

ROOT = Path(__file__).resolve().parents[2]
Plan = Callable[..., Any]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA,
    "llama-3-8b": {
        **LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    },
    "gemma-7b": {
        "model_type": "gemma", "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16",
    },
    "opt-30b": {
        "model_type": "opt", "hidden_size": 7168, "ffn_dim": 28672, "num_hidden_layers": 48,
        "num_attention_heads": 56, "max_position_embeddings": 2048, "torch_dtype": "float16",
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
"""Sizes as published."""
COST = LayerCost(io_hidden_s=1e-7, io_kv_s=2e-7, c_hidden_s=9e-8, c_token_s=6e-7)


@pytest.fixture
def path_of(tmp_path) -> Callable[[str], Path]:
    """The config.json of a model, alone in a folder."""

    def write(name: str, **changes: Any) -> Path:
        path = tmp_path / name / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**CONFIGS[name], **changes}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def plan(path_of, capsys) -> Plan:
    """The JSON that it prints for a model."""

    def run(name: str, *options: str) -> Any:
        assert main(["plan", "--model", str(path_of(name)), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("profile", ["a100-4ssd", "a100-1ssd", "h200-dram"])
@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-7b"])
def test_grouped_heads_are_stored_as_kv_and_partly_recomputed(plan, name, profile):
    found = plan(name, "--profile", profile, "--tokens", "16384")
    assert found["hidden_layers"] == 0
    assert found["kv_layers"] >= CONFIGS[name]["num_hidden_layers"] - 1
    assert 0 < found["recompute_tokens"] < 16384


@pytest.mark.parametrize("profile", ["a100-4ssd", "a100-1ssd", "h200-dram"])
@pytest.mark.parametrize("name", ["llama-2-7b", "gemma-7b", "qwen3-0.6b", "opt-30b"])
def test_wide_kv_is_stored_as_hidden_states(plan, name, profile):
    (*_, found) = plan(name, "--profile", profile)
    assert found["hidden_layers"] > found["kv_layers"]
    assert found["recompute_layers"] >= 1


def test_json_has_what_a_script_needs(plan):
    found = plan("llama-2-7b", "--profile", "a100-4ssd", "--tokens", "1024")
    assert found["method"] == "auto" and found["num_tokens"] == 1024
    names = {"hidden_layers", "kv_layers", "recompute_layers", "recompute_tokens", "io_s", "compute_s", "makespan_s"}
    assert names | {"bytes_per_token"} <= set(found)
    assert found["makespan_s"] >= max(found["io_s"], found["compute_s"])
    others = {row["method"]: row for row in found["alternatives"]}
    assert set(others) | {"auto"} == set(METHODS) and "auto" not in others
    assert found["makespan_s"] <= min(row["makespan_s"] for name, row in others.items() if name != "ideal")
    assert others["kv"]["bytes_per_token"] == 512 * 1024
    assert others["hidden"]["bytes_per_token"] == 31 * 8192
    assert others["recompute"]["recompute_tokens"] == 1024


def test_lengths(plan):
    assert [found["num_tokens"] for found in plan("llama-2-7b", "--profile", "a100-4ssd")] == [1024, 4096]
    several = plan("llama-2-7b", "--profile", "a100-4ssd", "--tokens", "100,2000,127")
    assert [found["num_tokens"] for found in several] == [64, 1984]


def test_a_method_of_choice_and_a_tier(plan):
    file, memory = (
        plan("llama-2-7b", "--profile", "a100-1ssd", "--tokens", "1024", "--method", "kv", "--tier", tier)
        for tier in ("file", "memory")
    )
    assert file["method"] == memory["method"] == "kv" and file["kv_layers"] == 32
    assert file["io_s"] == pytest.approx(memory["io_s"] * 25 / 6.9, rel=0.01)


def test_people_get_a_table(path_of, capsys):
    path = path_of("llama-2-7b")
    assert main(["plan", "--model", str(path.parent), "--profile", "4090-dram", "--tokens", "4096"]) == 0
    out = capsys.readouterr().out
    assert "32 layers of 4096, 32 heads (32 for K and V) of 128, float16" in out
    assert "profile 4090-dram, tier memory: RTX 4090" in out
    assert "> auto" in out and "32KV" in out and "512.0 KiB" in out
    assert all(f"  {name} " in out for name in METHODS if name != "auto")
    lines = [line for line in out.splitlines() if line.startswith(("  ", "> ")) and "method" not in line]
    assert "ideal" in lines[0] and "recompute" in lines[-1]


@pytest.mark.parametrize(
    ("method", "profile", "words"),
    [
        ("hidden", "a100-4ssd", "project layer 0 from the embedding, read 31 layers"),
        ("auto", "a100-1ssd", "recompute the first 12 layers, read 20 layers"),
        ("kv", "a100-1ssd", "read 32 layers"),
        ("recompute", "a100-1ssd", "prefill everything"),
        ("ideal", "a100-1ssd", "nothing to do"),
        ("hcache", "a100-1ssd", "recompute the first 11 layers, read 21 layers"),
        ("cake", "a100-1ssd", "recompute the first 576 tokens; for the others read 32 layers"),
    ],
)
def test_the_plan_in_words(path_of, capsys, method, profile, words):
    arguments = ["--model", str(path_of("llama-2-7b")), "--profile", profile, "--tokens", "1024"]
    assert main(["plan", *arguments, "--method", method]) == 0
    assert f"1,024 tokens, {method}: {words}\n" in capsys.readouterr().out


# --- profiles -------------------------------------------------------------------------------------------------------


def test_without_a_profile_one_is_told_how_to_get_one(path_of, tmp_path, capsys):
    assert main(["plan", "--model", str(path_of("llama-2-7b")), "--state-dir", str(tmp_path)]) == 2
    complaint = capsys.readouterr().err
    assert all(name in complaint for name in PLATFORMS) and '"io_hidden"' in complaint


def test_what_was_measured_is_the_default(plan, tmp_path):
    tiers = {"memory": COST, "file": COST.scaled(io=10)}
    profile = MeasuredProfile(machine="a box", model="ab" * 32, date="2026-11-21", tiers=tiers)
    (tmp_path / PROFILE_FILE).write_text(profile.to_json(), encoding="utf-8")
    options = ["--state-dir", str(tmp_path), "--tokens", "1024", "--method", "kv"]
    assert plan("llama-2-7b", *options)["io_s"] == pytest.approx(32 * 1024 * 2e-7)
    assert plan("llama-2-7b", *options, "--tier", "file")["io_s"] == pytest.approx(32 * 1024 * 2e-6)
    described = load_profile(None, tmp_path).description
    assert described == "measured on a box, 2026-11-21, for model abababababababab"


def test_a_profile_written_by_hand(plan, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"tokens": 1024, "io_hidden": 1e-3, "io_kv": 2e-3, "c_hidden": 1e-3, "c_token": 6e-3}')
    found = plan("llama-2-7b", "--profile", str(path), "--tokens", "1024", "--method", "kv")
    assert found["makespan_s"] == pytest.approx(32 * 2e-3)
    with pytest.raises(ConfigError, match="tier must not be given with a custom profile"):
        load_profile(str(path), tmp_path).layer_cost(geometry("llama-2-7b", tmp_path), "file")


def geometry(name: str, tmp_path: Path) -> Any:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    config = read_config(str(path))
    return geometry_of_config(config, dtype_of_config(config))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "profile must be a JSON file or one of a100-1ssd"),
        ("{", "cannot be read"),
        ('{"tokens": 1}', "io_hidden is missing"),
        ('{"tiers": {}, "version": 9}', "version must be 1, got 9"),
    ],
)
def test_a_broken_profile_is_refused_by_name(path_of, tmp_path, capsys, content, complaint):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert main(["plan", "--model", str(path_of("llama-2-7b")), "--profile", str(path)]) == 2
    error = capsys.readouterr().err
    assert complaint in error and "mine.json" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tokens", "63"], "--tokens must be at least 64"),
        (["--tokens", "many"], "--tokens must be numbers"),
        (["--method", "magic"], "method must be one of auto"),
        (["--tier", "tape"], "tier must be one of file, memory"),
        (["--tile-tokens", "100"], "tile_tokens must be a multiple of 64"),
    ],
)
def test_wrong_options_are_refused_by_name(path_of, capsys, options, complaint):
    assert main(["plan", "--model", str(path_of("llama-2-7b")), "--profile", "a100-1ssd", *options]) == 2
    assert complaint in capsys.readouterr().err


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ffn_weights"),
    [
        ("llama-2-7b", 3 * 4096 * 11008),
        ("opt-30b", 2 * 7168 * 28672),
        ("mixtral-8x7b", 2 * 3 * 4096 * 14336 + 8 * 4096),
        ("gemma-7b", 3 * 3072 * 24576),
    ],
)
def test_feed_forward_weights_that_a_token_uses(tmp_path, name, ffn_weights):
    assert geometry(name, tmp_path).ffn_weights == ffn_weights


def test_sizes_come_from_the_config(tmp_path):
    qwen3 = geometry("qwen3-0.6b", tmp_path)
    assert (qwen3.num_layers, qwen3.num_heads, qwen3.num_kv_heads, qwen3.head_size) == (28, 16, 8, 128)
    assert qwen3.dtype == "bfloat16" and qwen3.hidden_size == 1024
    assert geometry("llama-2-7b", tmp_path).num_kv_heads == 32


@pytest.mark.parametrize("dtype", ["auto", *DTYPE_BYTES])
def test_the_dtype_can_be_chosen(plan, dtype):
    found = plan("llama-2-7b", "--profile", "a100-1ssd", "--tokens", "64", "--method", "kv", "--dtype", dtype)
    assert found["bytes_per_token"] == 2 * 4096 * 32 * DTYPE_BYTES.get(dtype, 2)


def test_an_unknown_feed_forward_part_is_said(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}')
    assert main(["plan", "--model", str(path), "--profile", "a100-1ssd"]) == 2
    assert "ffn_weights must be known" in capsys.readouterr().err


def test_what_is_no_model_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for model in (tmp_path, tmp_path / "config.json", tmp_path / "nowhere" / "config.json"):
        assert main(["plan", "--model", str(model), "--profile", "a100-1ssd"]) == 2
        assert "model must be a folder with a config.json" in capsys.readouterr().err


def test_help_teaches_and_loads_nothing_heavy():
    code = (
        "import sys; from mii_hcache.__main__ import main\n"
        "try: main(['plan', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'deepspeed', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in (*METHODS, *PLATFORMS))
