"""The engine refuses what would corrupt, and models that it cannot serve right."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from mii_hcache.engine.families import FAMILIES
from mii_hcache.engine.fingerprint import model_fingerprint
from mii_hcache.engine.ragged_engine import build_engine, token_tensors
from mii_hcache.errors import ConfigError, HCacheError, UnsupportedModelError
from mii_hcache.runtime.placing import Placer
from mii_hcache.runtime.timeline import RestoreTimeline
from tests.engine_kit import VOCAB, greedy, poisoned_engine
from tests.fake_device import FakeStreams


def test_a_batch_that_does_not_fit_runs_nothing(tiny_model):
    engine = poisoned_engine(tiny_model("llama"), num_blocks=4, max_batch_tokens=128)
    engine.put([1], token_tensors([list(range(3, 43))]))
    for uids, batch, reason in (
        ([2], [[5] * 20], "KVCacheLimitExceeded"),
        ([1, 2], [[5], [6] * 17], "KVCacheLimitExceeded"),
        ([2], [[5] * 129], "KVCacheLimitExceeded|BatchTokenLimitExceeded"),
    ):
        with pytest.raises(HCacheError, match=reason):
            engine.put(uids, token_tensors(batch))
    assert engine.seen_tokens(1) == 40
    assert engine.num_free_blocks == 1
    with pytest.raises(HCacheError, match="2 blocks wanted, 1 of 4"):
        engine.reserve(3, 32)
    assert engine.blocks_of(3) == 0


def test_an_eviction_asks_the_device_for_nothing(tiny_model):
    """On a GPU it would wait for all that is launched."""
    engine = poisoned_engine(tiny_model("llama"), num_blocks=8, max_batch_tokens=128)
    engine.put([1], token_tensors([list(range(3, 43))]))
    sequence = engine.sequence(1)
    held = sequence.kv_cache_ids(on_device=False)[0, :3].tolist()
    sequence._kv_cache_ids = tuple(table.to("meta") for table in sequence._kv_cache_ids)  # which have no values
    freed = []
    engine.allocator.on_free = freed.extend
    engine.evict(1)
    assert freed == held and (engine.num_free_blocks, engine.num_tracked) == (8, 0)


def test_free_blocks_are_poisoned_and_no_block_is_none(tiny_model):
    engine = poisoned_engine(tiny_model("llama"), num_blocks=4, max_batch_tokens=128)
    engine.put([1], token_tensors([list(range(3, 23))]))
    assert not torch.isnan(engine.kv_pool[:, :2, 0]).any() and torch.isnan(engine.kv_pool[:, 2:]).all()
    engine.reserve(2, 0)
    engine.evict(2)
    engine.evict(1)
    assert torch.isnan(engine.kv_pool).all() and engine.num_free_blocks == 4


def test_truncated_sequences_go_on_as_if_the_rest_had_never_been(tiny_model):
    engine = poisoned_engine(tiny_model("llama"), num_blocks=64)
    prompt = random.Random(1).choices(range(3, VOCAB), k=200)
    expected, _ = greedy(engine, 1, prompt[:77], 10, chunk=768)
    engine.evict(1)
    engine.put([2], token_tensors([prompt]))
    engine.truncate(2, 76)
    again, _ = greedy(engine, 2, prompt[76:77], 10, chunk=768)
    assert again == expected
    with pytest.raises(HCacheError, match="cannot truncate"):
        engine.truncate(2, 10_000)


def _change_config(source, target, **changes):
    shutil.copytree(source, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
        ("llama", {"model_type": "gpt2"}, "'gpt2' is not served"),
        ("opt", {"do_layer_norm_before": False}, "norms after the blocks"),
        ("opt", {"activation_function": "gelu"}, "activation_function"),
    ],
)
def test_models_that_cannot_be_served_right_are_refused(tiny_model, tmp_path, family, changes, reason):
    model_dir = _change_config(tiny_model(family), tmp_path / "model", **changes)
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        build_engine(str(model_dir), num_blocks=8)
    for name in FAMILIES:
        assert name in str(refusal.value)


def test_wrong_settings_name_the_fix(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_engine(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="max_context_tokens is 4096, the model's limit is 2048"):
        build_engine(str(tiny_model("llama")), max_context_tokens=4096)


class TestFingerprint:
    def _of(self, model_dir, engine, cache_file=None, **changes):
        settings = {
            "config": engine.model().config,
            "dtype": "float32",
            "norm_eps": engine.model().norm_eps,
            "kernels": "torch",
            **changes,
        }
        return model_fingerprint(model_dir=model_dir, cache_file=cache_file, **settings)

    def test_changes_with_whatever_changes_the_numbers(self, tiny_model, tmp_path):
        engine = poisoned_engine(tiny_model("llama"), num_blocks=8)
        model_dir = tmp_path / "model"
        shutil.copytree(tiny_model("llama"), model_dir)
        base = self._of(model_dir, engine)
        assert base == self._of(tiny_model("llama"), engine), "a copy elsewhere is the same model"
        assert base != self._of(model_dir, engine, dtype="bfloat16")
        assert base != self._of(model_dir, engine, norm_eps=1e-5)
        assert base != self._of(tiny_model("llama-gqa"), engine)
        assert base == self._of(model_dir, engine, kernels="triton"), "our modules compute the same rows"
        assert base != self._of(model_dir, engine, kernels="stock")
        weights = next(model_dir.glob("*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert base != self._of(model_dir, engine)

    def test_digest_cache_follows_the_file(self, tiny_model, tmp_path):
        engine = poisoned_engine(tiny_model("llama"), num_blocks=8)
        model_dir = tmp_path / "model"
        shutil.copytree(tiny_model("llama"), model_dir)
        cache_file = tmp_path / "digests.json"
        first = self._of(model_dir, engine, cache_file)
        assert cache_file.stat().st_mode & 0o777 == 0o600
        assert first == self._of(model_dir, engine, cache_file)
        weights = next(model_dir.glob("*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert first != self._of(model_dir, engine, cache_file)
        cache_file.write_text("not json")
        assert first != self._of(model_dir, engine, cache_file)


def test_rotary_keeps_float32_frequencies_in_sixteen_bit(tiny_model):
    engine = poisoned_engine(tiny_model("llama"), dtype="bfloat16", num_blocks=8)
    assert engine.model().inv_freq.dtype is torch.float32


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1], [0, 2, 3], [3, 1]])
@pytest.mark.parametrize(("start", "num_tokens"), [(0, 64), (64, 64), (5, 70), (127, 1), (0, 200)])
def test_blocks_of_several_layers_are_gathered_as_each_by_itself(tiny_model, layers, start, num_tokens):
    """Also where a sequence's blocks are no neighbours, and where it begins or ends within one."""
    engine = poisoned_engine(tiny_model("llama-gqa"), num_blocks=26)
    for uid in range(1, 8):
        engine.put([uid], token_tensors([[3 + uid] * 33]))
    for uid in (2, 4, 5):  # what follows must take its blocks from gaps
        engine.evict(uid)
    engine.put([9], token_tensors([random.Random(1).choices(range(3, VOCAB), k=200)]))
    target, geometry = engine.target(9), engine.geometry
    assert len(target._runs) > 2, "nothing lies apart"
    out = torch.full((len(layers), num_tokens, 2, geometry.num_kv_heads, geometry.head_size), float("nan"))
    target.gather_kv(layers, start, out)
    for row, layer_idx in enumerate(layers):
        expected = torch.empty_like(out[row])
        target.read_kv(layer_idx, start, expected)
        assert torch.equal(out[row], expected) and not out[row].isnan().any()


def test_a_target_is_prepared_before_anything_runs_on_another_stream(tiny_model):
    """Or its tables would be made by the first projection, on a stream that nobody else waits for."""
    engine = poisoned_engine(tiny_model("llama"))
    engine.reserve(1, 100)
    streams = FakeStreams()
    placer = Placer(engine, streams, tile_spans=1, is_urgent=False)
    target = engine.target(1)
    assert "_all_slots" not in vars(target)
    placer.open(target, RestoreTimeline())
    slots = vars(target)["_all_slots"]
    assert slots.shape == (engine.blocks_of(1) * engine.block_size,) and slots.unique().numel() == slots.numel()
