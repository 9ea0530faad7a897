"""Costs of a layer: from FLOPs and bytes, by hand, measured; and that a broken profile says which field is broken."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.core.cost import (
    HardwareProfile,
    LayerCost,
    MeasuredProfile,
    custom_cost,
)
from mii_hcache.core.platforms import PLATFORMS, platform_named
from mii_hcache.errors import ConfigError
from tests.core.planner_kit import (
    GEMMA_7B,
    LLAMA_2_7B,
    LLAMA_2_13B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    OPT_30B,
    QWEN25_7B,
    slowed_costs,
)

COST = LayerCost(io_hidden_s=1e-7, io_kv_s=2e-7, c_hidden_s=1e-7, c_token_s=6e-7, c_attention_s=1e-9)
PROFILE = MeasuredProfile(
    machine="two cores, a disk",
    model="ab" * 32,
    date="2026-11-21T15:00:00Z",
    tiers={"memory": COST, "file": COST.scaled(io=4)},
    shape="4 layers of 256",
    spread=1.5,
)
UNIT = HardwareProfile(
    name="unit", source="made up", read_bytes_per_s={"file": 1e9, "memory": 1e12}, h2d_bytes_per_s=2e9,
    gemm_flop_per_s=1e12, attention_flop_per_s=1e12,
)  # fmt: skip


def test_a_forward_pays_for_each_key_once():
    """Tokens 2, 3, 4 attend to 3, 4, 5 keys."""
    assert COST.forward_s(2, 3) == pytest.approx(3 * 6e-7 + 12e-9)
    assert COST.forward_s(0, 1) == pytest.approx(6e-7 + 1e-9)
    assert COST.forward_s(7, 0) == 0


@settings(deadline=None)
@given(slowed_costs, st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000))
def test_a_forward_can_be_cut_anywhere(cost, start, one, other):
    whole = cost.forward_s(start, one + other)
    assert whole == pytest.approx(cost.forward_s(start, one) + cost.forward_s(start + one, other))


def test_scaling_touches_times_and_nothing_else():
    cost = LayerCost(
        io_hidden_s=1, io_kv_s=2, c_hidden_s=3, c_kv_s=4, c_token_s=5, c_attention_s=6, io_start_s=7, c_start_s=8,
        c_forward_start_s=9, io_slowdown=1.5, compute_slowdown=1.25,
    )  # fmt: skip
    assert cost.scaled(io=10, compute=100) == LayerCost(
        io_hidden_s=10, io_kv_s=20, c_hidden_s=300, c_kv_s=400, c_token_s=500, c_attention_s=600, io_start_s=70,
        c_start_s=800, c_forward_start_s=900, io_slowdown=1.5, compute_slowdown=1.25,
    )  # fmt: skip


def test_side_by_side_both_are_slower():
    cost = dataclasses.replace(COST, io_slowdown=1.5, compute_slowdown=2.0)
    assert cost.overlapped(6.0, 1.0) == pytest.approx((6.0 + 2 / 3, 2.0))  # 2 s together: 4/3 s of reading done
    assert cost.overlapped(6.0, 0.0) == (6.0, 0.0)
    assert cost.overlapped(0.0, 3.0) == (0.0, 3.0)
    assert COST.overlapped(6.0, 1.0) == (6.0, 1.0)


@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LayerCost)])
def test_a_cost_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a number >= "):
        dataclasses.replace(COST, **{name: value})


@pytest.mark.parametrize("name", ["io_slowdown", "compute_slowdown"])
def test_nothing_gets_faster_by_company(name):
    with pytest.raises(ConfigError, match=f"{name} must be a number >= 1"):
        dataclasses.replace(COST, **{name: 0.9})


# --- from FLOPs and bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "hidden_mflop", "layer_mflop"),
    [
        (LLAMA_2_7B, 67.1, 404.8),
        (LLAMA_2_13B, 104.9, 634.4),
        (OPT_30B, 205.5, 1233),
        (GEMMA_7B, 50.3, 553.6),
        (LLAMA_3_8B, 16.8, 436),
        (QWEN25_7B, 7.3, 466),
        (LLAMA_3_70B, 33.6, 1711),
    ],
)
def test_flops_of_real_models(geometry, hidden_mflop, layer_mflop):
    """The table of `paper.md` 3.1."""
    cost = UNIT.layer_cost(geometry)
    assert cost.c_hidden_s * 1e6 == pytest.approx(hidden_mflop, rel=0.01)
    assert cost.c_token_s * 1e6 == pytest.approx(layer_mflop, rel=0.001)


def test_attention_doubles_what_the_paper_says():
    """C_token / C_hidden grows from 6 to 8 at 16k tokens (`paper.md` 3.2; equation 9 has 7)."""
    cost = UNIT.layer_cost(LLAMA_2_7B)
    assert cost.token_s(1) / cost.c_hidden_s == pytest.approx(6.03, abs=0.01)
    assert cost.token_s(16384) / cost.c_hidden_s == pytest.approx(8.03, abs=0.01)


def test_reads_take_the_slower_of_tier_and_bus():
    assert UNIT.layer_cost(LLAMA_2_7B) == UNIT.layer_cost(LLAMA_2_7B, "file")
    assert UNIT.layer_cost(LLAMA_2_7B, "file").io_kv_s == pytest.approx(16384 / 1e9)
    assert UNIT.layer_cost(LLAMA_2_7B, "memory").io_kv_s == pytest.approx(16384 / 2e9)
    assert UNIT.layer_cost(LLAMA_2_7B, "memory").io_hidden_s == pytest.approx(8192 / 2e9)


def test_gpus_share_the_disks_and_pay_for_gathering():
    four = dataclasses.replace(UNIT, num_gpus=4, link_bytes_per_s=1e9)
    one = UNIT.layer_cost(OPT_30B, "file")
    both = four.layer_cost(OPT_30B, "file")
    assert both.io_kv_s == one.io_kv_s
    assert four.layer_cost(OPT_30B, "memory").io_kv_s == pytest.approx(one.io_kv_s / 8)
    assert both.c_hidden_s == pytest.approx(one.c_hidden_s / 4 + 14336 * 0.75 / 1e9)
    assert both.c_attention_s == pytest.approx(one.c_attention_s / 4)


def test_flops_need_the_feed_forward_weights():
    with pytest.raises(ConfigError, match="ffn_weights must be known"):
        UNIT.layer_cost(dataclasses.replace(LLAMA_2_7B, ffn_weights=0))


def test_feed_forward_weights_cannot_be_negative():
    with pytest.raises(ConfigError, match="ffn_weights must be >= 0, got -1"):
        dataclasses.replace(LLAMA_2_7B, ffn_weights=-1)


def test_an_unknown_tier_or_platform_lists_the_known():
    with pytest.raises(ConfigError, match="tier must be one of file, memory in profile 'unit', got 'tape'"):
        UNIT.layer_cost(LLAMA_2_7B, "tape")
    with pytest.raises(ConfigError, match=r"profile must be one of a100-1ssd, .*h200-dram.*, got 'abacus'"):
        platform_named("abacus")


@pytest.mark.parametrize("name", ["h2d_bytes_per_s", "gemm_flop_per_s", "attention_flop_per_s", "num_gpus"])
def test_a_rate_that_cannot_be_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(UNIT, **{name: 0})
    with pytest.raises(ConfigError, match="read_bytes_per_s"):
        dataclasses.replace(UNIT, read_bytes_per_s={})


def test_platforms_say_where_their_rates_come_from():
    for name, platform in PLATFORMS.items():
        assert platform.name == name and "rates" in platform.source
        assert "ssd" not in name or platform.layer_cost(LLAMA_2_7B).io_kv_s >= 16384 / 27.6e9
    assert "expected, not measured" in PLATFORMS["h200-dram"].source
    assert PLATFORMS["a100-1ssd"].layer_cost(LLAMA_2_7B).io_kv_s == pytest.approx(16384 / 6.9e9)
    assert PLATFORMS["a100-4ssd"].layer_cost(LLAMA_2_7B).io_kv_s == pytest.approx(16384 / 25e9)


# --- as files -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(slowed_costs, slowed_costs)
def test_a_measured_profile_survives_its_file(memory, file):
    profile = dataclasses.replace(PROFILE, tiers={"memory": memory, "file": file}, h2d_bytes_per_s=5e10)
    assert MeasuredProfile.from_json(profile.to_json()) == profile
    assert MeasuredProfile.from_json(profile.to_json()).layer_cost("file") == file
    assert profile.layer_cost() == memory


def changed(path: str, value: object) -> str:
    """The profile's file with one field replaced, or without it (None)."""
    body = json.loads(PROFILE.to_json())
    *parents, name = path.split(".")
    place = body
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[name]
    else:
        place[name] = value
    return json.dumps(body)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("version", 2, "version must be 1, got 2"),
        ("version", True, "version must be of type int"),
        ("version", None, "version is missing"),
        ("machine", None, "machine is missing"),
        ("machine", 3, "machine must be of type str"),
        ("tiers", {}, "tiers must name a storage tier"),
        ("tiers", [], "tiers must be of type dict"),
        ("tiers.file", 1.0, "tiers.file must be a JSON object"),
        ("tiers.file.io_kv_s", None, "tiers.file.io_kv_s is missing"),
        ("tiers.file.io_kv_s", "fast", "tiers.file.io_kv_s must be of type float"),
        ("tiers.file.io_kv_s", -1.0, "tiers.file.io_kv_s must be a number >= 0"),
        ("tiers.file.io_kv_s", math.nan, "tiers.file.io_kv_s must be of type float, got nan"),
        ("tiers.file.speed", 1.0, "unknown field tiers.file.speed"),
        ("colour", "red", "unknown field colour"),
    ],
)
def test_a_broken_measured_profile_names_the_field(path, value, complaint):
    with pytest.raises(ConfigError, match=complaint):
        MeasuredProfile.from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_profile_is_refused(text):
    for read in (MeasuredProfile.from_json, custom_cost):
        with pytest.raises(ConfigError, match="profile must be"):
            read(text)


def test_fields_that_came_later_have_defaults():
    body = json.loads(PROFILE.to_json())
    del body["shape"], body["spread"], body["tiers"]["file"]["c_start_s"]
    read = MeasuredProfile.from_json(json.dumps(body))
    assert read.shape == "" and not read.is_doubtful and read.tiers["file"].c_start_s == 0


def test_an_unmeasured_tier_is_refused():
    with pytest.raises(ConfigError, match="tier must be one of memory, file"):
        PROFILE.layer_cost("tape")


def test_a_custom_profile_by_hand():
    cost = custom_cost('{"tokens": 1000, "io_hidden": 1, "io_kv": 2.0, "c_hidden": 0.5, "c_token": 6}')
    assert cost == LayerCost(io_hidden_s=1e-3, io_kv_s=2e-3, c_hidden_s=5e-4, c_token_s=6e-3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"tokens": 0, "io_hidden": 1, "io_kv": 2, "c_hidden": 1, "c_token": 6}', "tokens must be >= 1"),
        ('{"tokens": 1, "io_hidden": 1, "io_kv": 2, "c_hidden": 1}', "c_token is missing"),
        ('{"tokens": 1, "io_hidden": -1, "io_kv": 2, "c_hidden": 1, "c_token": 6}', "io_hidden_s must be a number"),
        ('{"tokens": 1, "io_hidden": 1, "io_kv": 2, "c_hidden": 1, "c_token": 6, "x": 1}', "unknown field x"),
    ],
)
def test_a_broken_custom_profile_names_the_field(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        custom_cost(text)
