"""Which state is saved for which model."""

from __future__ import annotations

import pytest

from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.core.methods import METHODS, default_method, method_named
from mii_hcache.errors import ConfigError


@pytest.mark.parametrize(
    ("model", "sizes", "expected"),
    [
        ("Llama-2-7B: every head its own K and V", (32, 4096, 32, 32, 128), "hidden"),
        ("OPT-30B: every head its own K and V", (48, 7168, 56, 56, 128), "hidden"),
        ("Gemma-7B: heads wider than hidden_size / num_heads", (28, 3072, 16, 16, 256), "hidden"),
        ("Gemma-2-9B: half as many KV heads, but wide ones", (42, 3584, 16, 8, 256), "hidden"),
        ("Gemma-2B: one KV head", (18, 2048, 8, 1, 256), "kv"),
        ("Llama-3-8B: one KV head for four", (32, 4096, 32, 8, 128), "kv"),
        ("one KV head for two: equal rows, and K and V need no projection", (4, 128, 8, 4, 16), "kv"),
    ],
)
def test_the_smaller_row_is_saved(model, sizes, expected):
    names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size")
    geometry = ModelGeometry(**dict(zip(names, sizes, strict=True)), dtype="bfloat16")
    assert default_method(geometry).name == expected, model


def test_each_name_finds_its_method():
    assert {name for name, method in METHODS.items() if not method.needs_costs} == {
        "hidden",
        "kv",
        "recompute",
        "ideal",
    }
    assert {name for name, method in METHODS.items() if not method.saves} == {"recompute", "ideal"}
    assert all(method_named(name).name == name and method.summary for name, method in METHODS.items())


@pytest.mark.parametrize("name", ["", "Hidden", "offload"])
def test_an_unknown_name_is_refused_with_the_choices(name):
    with pytest.raises(ConfigError, match=f"method must be one of auto, .*, got {name!r}"):
        method_named(name)
