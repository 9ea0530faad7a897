"""Plain Hugging Face models behind the runtime's ports: every answer is what the model says without us."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mii_hcache
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.methods import METHODS
from mii_hcache.engine.attached import AttachedModel
from mii_hcache.engine.sequence_runner import SequenceRunner
from mii_hcache.engine.transformers_adapter import TransformersEngine, fingerprint_of
from mii_hcache.errors import ConfigError, HCacheError, RequestError, StateDirBusyError, UnsupportedModelError
from mii_hcache.runtime.capture import HostCapture
from mii_hcache.storage.catalog import Catalog
from mii_hcache.storage.format import BLOCK_BYTES, SegmentHeader
from mii_hcache.storage.memory import MemoryStore
from tests.engine_kit import VOCAB, open_client, poisoned_engine, tiny_hf_model

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("llama", "llama-gqa", "yarn", "mistral-window", "mixtral", "qwen2", "qwen2-window", "qwen3", "gemma", "phi3")
NUM_NEW = 20


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: two threads that wait for each other on shared cores take ten times as long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


_models: dict[str, Any] = {}


def model_named(name: str) -> Any:
    """A tiny model, made once: an attachment leaves it as it was."""
    if name not in _models:
        _models[name] = _yarn_model() if name == "yarn" else tiny_hf_model(name)
    return _models[name]


def _yarn_model(rope_type: str = "yarn") -> Any:
    model = tiny_hf_model("llama-gqa")
    model.config.rope_parameters = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def random_ids(seed: int, num_tokens: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=num_tokens)


def plain(model: Any, token_ids: list[int], num_new: int = NUM_NEW, cache: Any = None) -> tuple[int, ...]:
    """What the model's own generate says."""
    ids = torch.tensor([token_ids])
    mask = torch.ones_like(ids)
    told = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=num_new, do_sample=False, pad_token_id=0
    )
    return tuple(told[0, len(token_ids) :].tolist())


def attach(model: Any, state_dir: Path | None = None, **settings: Any) -> AttachedModel:
    return mii_hcache.attach(model, state_dir, state_capacity_bytes=64 << 20, dram_capacity_bytes=64 << 20, **settings)


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hidden", "kv"])
@pytest.mark.parametrize("name", MODELS)
def test_three_turns_say_what_plain_generate_says(tmp_path, name, method):
    model = model_named(name)
    history = random_ids(0, 130)
    seen = 0
    for turn, tier in enumerate((None, "memory", "file")):
        if turn != 1:  # the last turn comes after a restart
            attached = attach(model, tmp_path, method=method)
        result = attached.generate(history, max_new_tokens=NUM_NEW)
        assert result.token_ids == plain(model, history)
        report = result.hcache
        assert (report.restored_tokens, report.restored_from) == (seen // 64 * 64, tier)
        assert report.prefill_tokens == len(history) - report.restored_tokens
        assert report.method == (method if tier else None)
        assert report.miss_reason == (None if tier else "not_saved")
        assert report.ttft_ms > report.restore_ms >= 0
        seen = len(history) + NUM_NEW - 1  # the last token was never run
        history = [*result.prompt_token_ids, *result.token_ids, *random_ids(turn + 1, 53)]
        if turn != 0:
            attached.close()


def test_the_smaller_kind_is_saved_unless_told_otherwise():
    for name, kind in (("llama", "hidden"), ("llama-gqa", "kv")):
        with attach(model_named(name)) as attached:
            attached.save(random_ids(0, 128))
            assert attached.generate(random_ids(0, 130), max_new_tokens=1).hcache.method == kind


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "phi3"])
@pytest.mark.parametrize("method", ["hidden", "kv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_cache_is_the_one_that_was_dropped(name, method, dtype):
    model = tiny_hf_model(name).to(dtype) if dtype is torch.bfloat16 else model_named(name)
    token_ids = random_ids(3, 650)
    kept = transformers.DynamicCache()
    with torch.no_grad():
        model(torch.tensor([token_ids[:640]]), past_key_values=kept, use_cache=True)
    with attach(model, method=method) as attached:
        assert attached.save(token_ids) == 640
        assert attached.restorable_tokens(token_ids) == 640
        restored = attached.restore(token_ids)
        assert restored.get_seq_length() == 640
        for kept_layer, layer in zip(kept.layers, restored.layers, strict=True):
            for kept_states, states in ((kept_layer.keys, layer.keys), (kept_layer.values, layer.values)):
                if method == "kv":
                    assert torch.equal(states, kept_states)
                else:
                    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
                    torch.testing.assert_close(states, kept_states, rtol=tolerance, atol=tolerance)
        if dtype is torch.float32:
            assert plain(model, token_ids, cache=restored) == plain(model, token_ids)
    assert restored.get_seq_length() == 640 + 10 + NUM_NEW - 1 or dtype is torch.bfloat16  # the caller's own


@pytest.mark.parametrize("method", ["hidden", "kv"])
def test_what_the_ragged_engine_saved_is_the_same_state(tiny_model, method):
    store = MemoryStore(64 << 20)
    client = open_client(poisoned_engine(tiny_model("qwen3"), num_blocks=60), store=store, method=method)
    history = random_ids(5, 300)
    client.ask(history, 2)
    client.service.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
    runner = SequenceRunner(
        engine=TransformersEngine(model), store=store, method=METHODS[method], fingerprint=b"test"
    )  # the client's; a real one keeps the engines apart
    with runner.sequence(history, b"", max_restored=299) as (uid, report):
        assert (report.restored_tokens, report.method) == (256, method)
        restored = runner.engine.target(uid).cache
        fresh = model(torch.tensor([history[:256]]), use_cache=True).past_key_values
        for layer, fresh_layer in zip(restored.layers, fresh.layers, strict=True):
            torch.testing.assert_close(layer.keys, fresh_layer.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.values, fresh_layer.values, rtol=1e-4, atol=1e-4)
    runner.close()


def test_sampling_depends_on_the_seed_and_not_on_what_was_restored():
    prompt = random_ids(7, 200)
    with attach(model_named("llama")) as attached:
        options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95, "top_k": 50}
        first = attached.generate(prompt, seed=1, **options)
        again = attached.generate(prompt, seed=1, **options)
        other = attached.generate(prompt, seed=2, **options)
    assert first.token_ids == again.token_ids != other.token_ids
    assert (first.hcache.restored_tokens, again.hcache.restored_tokens) == (0, 192)


def test_a_stop_token_ends_the_answer():
    model, prompt = model_named("llama"), random_ids(8, 30)
    told = plain(model, prompt)
    model.generation_config.eos_token_id = told[5]
    stop_at = told.index(told[5])
    try:
        with attach(model) as attached:
            result = attached.generate(prompt, max_new_tokens=NUM_NEW)
            assert (result.token_ids, result.finish_reason) == (told[: stop_at + 1], "stop")
            result = attached.generate(prompt, max_new_tokens=NUM_NEW, stop_token_ids=[])
            assert (result.token_ids, result.finish_reason) == (told, "length")
            result = attached.generate(prompt, max_new_tokens=NUM_NEW, stop_token_ids=[told[2]])
            assert result.token_ids == told[: told.index(told[2]) + 1]
    finally:
        model.generation_config.eos_token_id = 2


class LetterTokenizer:
    """A token is a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(char) for char in text]}

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(token_id - 3) for token_id in token_ids if token_id > 2)


def test_text_needs_a_tokenizer():
    model = model_named("llama")
    with attach(model) as attached, pytest.raises(ConfigError, match="tokenizer="):
        attached.generate("hello")
    with attach(model, tokenizer=LetterTokenizer()) as attached:
        result = attached.generate("hello", max_new_tokens=4)
        assert result.prompt_token_ids == tuple(3 + ord(char) for char in "hello")
        assert result.text == LetterTokenizer().decode(list(result.token_ids), True)
        assert attached.save("hello" * 30) == attached.restorable_tokens("hello" * 30) == 128


def test_tensors_are_prompts_too():
    with attach(model_named("llama")) as attached:
        ids = torch.tensor(random_ids(1, 130))
        assert attached.save(ids) == attached.restorable_tokens(ids[None]) == 128
        assert attached.restore(ids[None]).get_seq_length() == 128
        with pytest.raises(RequestError, match="one prompt"):
            attached.save(torch.stack([ids, ids]))


# --- saving -----------------------------------------------------------------------------------------------------------


def test_save_runs_only_what_is_not_saved(monkeypatch):
    token_ids = random_ids(2, 1300)
    ran: list[int] = []
    put = TransformersEngine.put
    monkeypatch.setattr(
        TransformersEngine, "put", lambda self, uid, ids: (ran.append(len(ids)), put(self, uid, ids))[1]
    )
    with attach(model_named("llama")) as attached:
        assert attached.save(token_ids[:600]) == 576 and ran == [512, 64]
        assert attached.save(token_ids[:600]) == 576 and ran == [512, 64]
        assert attached.save(token_ids) == 1280 and ran == [512, 64, 512, 192]
        assert attached.save(token_ids[:60]) == 0
        assert attached.restorable_tokens(token_ids[:128]) == 64  # its last token must run
        assert attached.generate(token_ids[:60], max_new_tokens=1).hcache.miss_reason == "too_short"


def test_the_last_token_is_left_to_run():
    model, prompt = model_named("llama"), random_ids(15, 128)
    with attach(model) as attached:
        for restored in (0, 64):
            result = attached.generate(prompt, max_new_tokens=NUM_NEW)
            assert (result.token_ids, result.hcache.restored_tokens) == (plain(model, prompt), restored)


def test_a_prompt_waits_for_its_own_state(monkeypatch):
    put = MemoryStore.put
    monkeypatch.setattr(MemoryStore, "put", lambda self, *args: (time.sleep(0.1), put(self, *args))[1])
    prompt = random_ids(16, 200)
    with attach(model_named("llama")) as attached:
        attached.generate(prompt, max_new_tokens=1)
        assert attached.generate(prompt, max_new_tokens=1).hcache.restored_tokens == 192


def test_rows_that_found_no_room_are_read_from_the_cache(monkeypatch):
    model, prompt = model_named("llama"), random_ids(17, 200)
    monkeypatch.setattr(HostCapture, "begin", lambda self, num_rows, wait_s: False)
    with attach(model, method="hidden") as attached:
        attached.generate(prompt, max_new_tokens=1)
        result = attached.generate(prompt, max_new_tokens=NUM_NEW)
        assert (result.hcache.restored_tokens, result.hcache.method) == (192, "kv")
        assert result.token_ids == plain(model, prompt)


def test_what_save_saved_is_durable(tmp_path, monkeypatch):
    flushed: list[int] = []
    with attach(model_named("llama"), tmp_path) as attached:
        store = attached._state.store
        monkeypatch.setattr(store, "flush", lambda: flushed.append(store.stats().num_spans))
        attached.save(random_ids(18, 200))
        assert flushed == [3]
        monkeypatch.undo()


def test_recompute_saves_nothing():
    with attach(model_named("llama"), method="recompute") as attached:
        prompt = random_ids(4, 200)
        assert attached.save(prompt) == 0
        result = attached.generate(prompt, max_new_tokens=NUM_NEW)
        assert result.token_ids == plain(model_named("llama"), prompt)
        assert (result.hcache.prefill_tokens, result.hcache.miss_reason) == (200, "recompute")


def test_tenants_share_nothing():
    prompt = random_ids(6, 200)
    with attach(model_named("llama")) as attached:
        attached.save(prompt, tenant_salt=b"a")
        assert attached.restorable_tokens(prompt, tenant_salt=b"a") == 192
        assert attached.restorable_tokens(prompt) == attached.restorable_tokens(prompt, tenant_salt=b"b") == 0
        assert attached.restore(prompt, tenant_salt=b"b").get_seq_length() == 0
        assert attached.generate(prompt, max_new_tokens=1, tenant_salt=b"b").hcache.restored_tokens == 0
        assert attached.generate(prompt, max_new_tokens=1, tenant_salt=b"a").hcache.restored_tokens == 192


def test_one_owner_of_a_state_directory(tmp_path):
    with attach(model_named("llama"), tmp_path), pytest.raises(StateDirBusyError):
        attach(model_named("llama"), tmp_path)
    attach(model_named("llama"), tmp_path).close()


def test_the_fingerprint_covers_weights_config_and_dtype():
    model = tiny_hf_model("qwen3")
    first = fingerprint_of(model)
    assert first == fingerprint_of(model_named("qwen3")) != fingerprint_of(model_named("llama"))
    model.model.rotary_emb.inv_freq[3] *= 1.5  # in no state_dict, in no config
    assert fingerprint_of(model) != first
    model.model.rotary_emb.inv_freq[3] /= 1.5
    model.config.pad_token_id = 0  # what many scripts do; no number changes
    assert fingerprint_of(model) == first
    with torch.no_grad():
        model.model.layers[3].self_attn.k_norm.weight[1] += 1e-3
    changed = fingerprint_of(model)
    assert changed != first
    model.config.rms_norm_eps = 1e-5
    assert fingerprint_of(model) != changed
    assert fingerprint_of(model.to(torch.bfloat16)) != changed
    scaled = [fingerprint_of(_yarn_model(rope_type)) for rope_type in ("yarn", "linear")]
    assert scaled[0] != scaled[1]


# --- the model belongs to someone else --------------------------------------------------------------------------------


def test_the_owners_forwards_are_not_captured():
    model = model_named("llama")
    prompt, strange = random_ids(9, 150), torch.tensor([random_ids(10, 128)])

    def run_another(*args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: model(strange))
            other.start()
            other.join()

    with attach(model, method="hidden") as attached:
        hook = model.model.layers[1].register_forward_pre_hook(run_another)
        attached.save(prompt)
        hook.remove()
        result = attached.generate(prompt, max_new_tokens=NUM_NEW)
        assert (result.hcache.restored_tokens, result.hcache.method) == (128, "hidden")  # nothing had to be healed
        assert result.token_ids == plain(model, prompt)
        assert any(layer.input_layernorm._forward_hooks for layer in model.model.layers)
    assert not any(layer.input_layernorm._forward_hooks for layer in model.model.layers)


def test_closed_is_closed():
    attached = attach(model_named("llama"))
    attached.close()
    attached.close()
    for call in (attached.generate, attached.save, attached.restore, attached.restorable_tokens):
        with pytest.raises(HCacheError, match="closed"):
            call([5, 6, 7])


def test_any_thread_may_ask():
    model = model_named("llama")
    prompts = [random_ids(seed, 100 + 30 * seed) for seed in range(4)]
    told: dict[int, tuple[int, ...]] = {}
    with attach(model, method="hidden") as attached:

        def ask(idx: int) -> None:
            told[idx] = attached.generate(prompts[idx], max_new_tokens=6).token_ids

        threads = [threading.Thread(target=ask, args=(idx,)) for idx in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [attached.restorable_tokens(prompt) for prompt in prompts] == [64, 128, 128, 128]
        counted = attached._runner.counters.snapshot()
        assert {name for name in counted if name.startswith(("dropped", "healed", "save_errors"))} == set()
    assert told == {idx: plain(model, prompt, 6) for idx, prompt in enumerate(prompts)}


def test_deepspeed_is_never_loaded(tiny_model):
    code = """
import sys, mii_hcache, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with mii_hcache.attach(model) as attached:
    assert attached.save(range(3, 203)) == 192
    assert attached.generate(range(3, 203), max_new_tokens=2).hcache.restored_tokens == 192
print(sorted({"deepspeed", "mii", "fastapi"} & {name.split(".")[0] for name in sys.modules}))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_model("llama")], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# --- when things go wrong ---------------------------------------------------------------------------------------------


def _flip_bits(state_dir: Path) -> None:
    """A bit in each chunk of the last spans, wherever they lie: what comes before them is restored."""
    with closing(Catalog(state_dir / "catalog.sqlite", None)) as catalog:
        rows = [row for row in catalog.rows if row.record.span_idx >= 6]
    assert rows
    for segment, slot in (place for row in rows for place in row.places):
        with (state_dir / "segments" / f"{segment:08d}.seg").open("r+b") as file:
            slot_bytes = SegmentHeader.parse(os.pread(file.fileno(), BLOCK_BYTES, 0)).slot_bytes
            at = BLOCK_BYTES + slot * slot_bytes + BLOCK_BYTES + 100
            os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, at)[0] ^ 16]), at)


@pytest.mark.parametrize("method", ["hidden", "kv"])
def test_damage_changes_no_answer(tmp_path, method):
    model, prompt = model_named("llama"), random_ids(11, 650)
    told = plain(model, prompt)
    with attach(model, tmp_path, method=method) as attached:
        attached.save(prompt)
    _flip_bits(tmp_path)
    with attach(model, tmp_path, method=method) as attached:
        result = attached.generate(prompt, max_new_tokens=NUM_NEW)
        assert result.token_ids == told
        assert 0 < result.hcache.restored_tokens < 640 and result.hcache.miss_reason == "corrupt"
        healed = attached.generate(prompt, max_new_tokens=NUM_NEW)
        assert healed.token_ids == told
        assert (healed.hcache.restored_tokens, healed.hcache.miss_reason) == (640, None)


def test_a_restore_that_fails_is_a_prefill(monkeypatch):
    model, prompt = model_named("llama"), random_ids(12, 200)
    with attach(model) as attached:
        attached.save(prompt)
        monkeypatch.setattr(MemoryStore, "get_into", lambda self, reads: 1 / 0)
        result = attached.generate(prompt, max_new_tokens=NUM_NEW)
    assert result.token_ids == plain(model, prompt)
    assert (result.hcache.restored_tokens, result.hcache.miss_reason) == (0, "restore_failed")


@pytest.mark.parametrize("method", ["hidden", "kv"])
def test_an_interrupted_answer_leaves_right_state_behind(monkeypatch, method):
    model, prompt = model_named("llama"), random_ids(13, 180)
    layer = model.model.layers[2]
    with attach(model, method=method) as attached:
        count = 0

        def interrupt(*args: Any) -> None:
            nonlocal count
            count += 1
            if count == 30:
                raise KeyboardInterrupt  # in the middle of a step: two layers have it in their caches

        hook = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            attached.generate(prompt, max_new_tokens=100, stop_token_ids=[])
        hook.remove()
        longer = [*prompt, *plain(model, prompt, 40)]
        result = attached.generate(longer, max_new_tokens=NUM_NEW)
        assert result.hcache.restored_tokens == 192
        assert result.token_ids == plain(model, longer)


def test_numbers_that_are_not_finite_are_not_saved(monkeypatch):
    model, prompt = model_named("llama"), random_ids(14, 200)
    put = TransformersEngine.put
    with attach(model) as attached:
        monkeypatch.setattr(TransformersEngine, "put", lambda self, uid, ids: put(self, uid, ids) * float("nan"))
        with pytest.raises(HCacheError, match="not finite"):
            attached.save(prompt)
        assert attached.restorable_tokens(prompt) == 0
        monkeypatch.undo()
        assert attached.generate(prompt, max_new_tokens=NUM_NEW).token_ids == plain(model, prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "no tokens"), ([5, VOCAB], "must be in"), ([-1], "must be in"), ([5] * 2040, "holds 2048 tokens")],
)
def test_prompts_that_do_not_fit_are_refused(prompt, message):
    with attach(model_named("llama")) as attached, pytest.raises(RequestError, match=message):
        attached.generate(prompt, max_new_tokens=9)


def test_models_that_cannot_be_served_are_refused():
    refusals = {
        "OPTForCausalLM": model_named("opt"),
        "rotary scaling 'dynamic'": _yarn_model("dynamic"),
        "Identity": torch.nn.Identity(),
        "LlamaModel": model_named("llama").model,
        "weights on cpu, meta": _partly_elsewhere(),
        "training mode": tiny_hf_model("llama").train(),
    }
    for reason, model in refusals.items():
        with pytest.raises(UnsupportedModelError, match=rf"{reason}.*Served: llama, "):
            mii_hcache.attach(model)


def _partly_elsewhere() -> Any:
    model = tiny_hf_model("llama")
    model.lm_head.to("meta")
    return model


def test_settings_are_checked_first():
    for wrong in ({"method": "magic"}, {"dram_capacity_bytes": 1}, {"state_capacity_bytes": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            mii_hcache.attach(model_named("llama"), **wrong)


def test_rows_are_those_of_the_geometry():
    geometry = TransformersEngine(model_named("qwen3")).geometry
    assert (geometry.num_layers, geometry.hidden_size, geometry.num_kv_heads, geometry.head_size) == (4, 128, 4, 40)
    assert geometry.row_bytes(ChunkKind.KV) == 2 * 4 * 40 * 4
