"""Settings are refused when they are made, by name, with the value."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mii_hcache.config import HCacheConfig, default_state_dirs
from mii_hcache.errors import ConfigError


def test_defaults_are_valid_and_frozen():
    config = HCacheConfig()
    assert (config.method, config.keep, config.save_wait) == (None, "lru", 0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.keep = "none"


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("dtype", "int8"),
        ("dtype", "torch.float16"),
        ("keep", "forever"),
        ("kernels", "cuda"),
        ("method", "offload"),
        ("save", "later"),
        ("scatter_threads", 0),
        ("block_size", 0),
        ("max_batch_tokens", 0),
        ("max_sequences", -1),
        ("save_threads", 0),
        ("save_after", -1),
        ("max_waiting", 0),
        ("state_capacity_bytes", (1 << 20) - 1),
        ("dram_capacity_bytes", 0),
        ("kv_blocks", 0),
        ("max_context_tokens", 0),
        ("save_wait", -0.01),
        ("save_wait", 10.1),
        ("save_wait", float("nan")),
        ("restore_slice_s", 0.0),
        ("emulated_read_bytes_per_s", 0.0),
        ("restore_slice_s", -1.0),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_itself(name, bad):
    with pytest.raises(ConfigError) as caught:
        HCacheConfig(**{name: bad})
    assert name in str(caught.value) and str(bad) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("dtype", "bfloat16"),
        ("keep", "none"),
        ("method", "recompute"),
        ("block_size", 1),
        ("block_size", None),
        ("kernels", "stock"),
        ("save_threads", 1),
        ("scatter_threads", 1),
        ("scatter_threads", None),
        ("save", "direct"),
        ("save_after", 0),
        ("state_capacity_bytes", 1 << 20),
        ("kv_blocks", 1),
        ("max_context_tokens", None),
        ("save_wait", 0),
        ("save_wait", 10),
        ("restore_slice_s", 1e-6),
    ],
)
def test_the_edges_are_allowed(name, good):
    assert getattr(HCacheConfig(**{name: good}), name) == good


def test_from_dict_takes_every_field():
    settings = dataclasses.asdict(HCacheConfig(model="some/model", method="kv", save_wait=0.5))
    assert HCacheConfig.from_dict(settings) == HCacheConfig(model="some/model", method="kv", save_wait=0.5)


def test_from_dict_refuses_unknown_settings_and_says_which_are_known():
    with pytest.raises(ConfigError, match=r"unknown setting blocksize, methods; known: .*block_size.*method"):
        HCacheConfig.from_dict({"methods": "kv", "blocksize": 16, "model": None})


def test_from_dict_checks_values_too():
    with pytest.raises(ConfigError, match="block_size"):
        HCacheConfig.from_dict({"block_size": 0})


def test_state_dir_by_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MII_HCACHE_STATE_DIR", raising=False)
    assert default_state_dirs() == ("/home/someone/.cache/mii_hcache/state",)
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast/cache")
    assert default_state_dirs() == ("/fast/cache/mii_hcache/state",)
    monkeypatch.setenv("MII_HCACHE_STATE_DIR", "/nvme/state")
    assert default_state_dirs() == ("/nvme/state",)
    monkeypatch.setenv("MII_HCACHE_STATE_DIR", "/nvme0/state:/nvme1/state")
    assert HCacheConfig().state_dirs == ("/nvme0/state", "/nvme1/state")
    assert HCacheConfig(state_dir="/a").state_dirs == ("/a",)
    assert HCacheConfig(state_dir=["/a", "/b"]).state_dirs == ("/a", "/b")
    assert HCacheConfig(state_dir=Path("/a")).state_dirs == ("/a",)
    assert HCacheConfig.from_dict({"state_dir": [Path("/a"), "/b"]}).state_dirs == ("/a", "/b")
    for nothing in ([], [""], [1], 1):
        with pytest.raises(ConfigError, match="state_dir"):
            HCacheConfig(state_dir=nothing)
