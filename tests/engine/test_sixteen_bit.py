"""16-bit: a restored context stays within the engine's own noise.

A matrix product of another shape may round differently, so bits are not the measure. The bound is measured on the same
engine, by the same tokens with other batch splits; `mii_hcache/tools/limits.py` says how, and why so. A restored
context must stay within it, and give equal tokens wherever the gap between the two best logits exceeds twice the bound.
Restored `kv` is bitwise.
"""

from __future__ import annotations

import random

import pytest
import torch

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.identity import spans_of
from mii_hcache.core.plans import StoragePlan
from mii_hcache.engine.ragged_engine import HCacheEngine, token_tensors
from mii_hcache.runtime.lookup import look_up
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.tools.limits import Agreement, Limits, noise_of
from tests.engine_kit import VOCAB, poisoned_engine

HISTORY, ANSWER = 448, 48


def _run(engine: HCacheEngine, saver: Saver | None, uid: int, tokens: list[int]) -> torch.Tensor:
    if saver is not None:
        saver.begin_step([StepSegment(uid=uid, token_ids=tokens)])
    logits = engine.put([uid], token_tensors([tokens]))
    if saver is not None:
        saver.end_step()
    return logits[0].float()


def _teacher_forced(engine: HCacheEngine, uid: int, answer: list[int], first: torch.Tensor) -> torch.Tensor:
    rows = [first]
    for token in answer[:-1]:
        rows.append(_run(engine, None, uid, [token]))
    return torch.stack(rows)


def _prefill(engine: HCacheEngine, uid: int, tokens: list[int], chunk: int, saver: Saver | None = None) -> torch.Tensor:
    logits = torch.empty(0)
    for start in range(0, len(tokens), chunk):
        logits = _run(engine, saver, uid, tokens[start : start + chunk])
    return logits


H, KV = ChunkKind.HIDDEN, ChunkKind.KV
SAVED = {
    "hidden": ((None, H, H, H), 0),
    "kv": ((KV, KV, KV, KV), 0),
    "hidden and kv, first tokens recomputed": ((None, H, H, KV), 128),
    "first layers recomputed": ((None, None, H, KV), 0),
}
"""Layers of the tiny models, and leading tokens that are recomputed."""


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "llama-gqa", "opt", "qwen3", "gemma"])
def test_restored_logits_stay_within_the_engines_own_noise(tiny_model, family, dtype, saved):
    engine = poisoned_engine(tiny_model(family), dtype=dtype, num_blocks=200, max_batch_tokens=512)
    prompt = random.Random(8).choices(range(3, VOCAB), k=HISTORY + 40)
    answer = random.Random(9).choices(range(3, VOCAB), k=ANSWER)

    store, counters = MemoryStore(1 << 28), Counters()
    kinds, recompute_tokens = SAVED[saved]
    plan = StoragePlan(method="test", kinds=kinds)
    saver = Saver(adapter=engine, store=store, plan=plan, max_batch_tokens=512, counters=counters)
    engine.model().qkv_input_tap = saver
    saver.open(1, seed=b"s", token_ids=[])
    whole = _teacher_forced(engine, 1, answer, _prefill(engine, 1, prompt, 512, saver))
    assert saver.drain(10)
    saved_kv = torch.stack([_kv_of(engine, 1, layer) for layer in range(engine.geometry.num_layers)])
    saver.close(1)
    saver.stop()
    engine.model().qkv_input_tap = None

    runs = [whole]
    for uid, chunk in ((2, 96), (3, 37), (4, 200), (6, 256), (7, 64)):  # fills come in 256, too
        split = _teacher_forced(engine, uid, answer, _prefill(engine, uid, prompt, chunk))
        runs.append(split)
        engine.evict(uid)
    limits = Limits(dtype=engine.dtype, scale=float(whole.abs().max()), noise=noise_of(runs))
    assert 0 < limits.logits < 0.1 * limits.scale, (
        "two batch splits that agree to the bit would make this test prove nothing"
    )

    engine.evict(1)
    lookup = look_up(store, list(spans_of(b"s", prompt)), max_tokens=HISTORY)
    assert lookup.num_tokens == HISTORY
    engine.reserve(5, HISTORY)
    restorer = Restorer(adapter=engine, store=store, counters=counters)
    outcome = restorer.start(engine.target(5), lookup.records, prompt, recompute_tokens=recompute_tokens).step(
        60, wait=True
    )
    assert outcome is not None and outcome.num_tokens == HISTORY
    restorer.stop()
    if saved == "kv":
        restored_kv = torch.stack([_kv_of(engine, 5, layer) for layer in range(engine.geometry.num_layers)])
        assert torch.equal(restored_kv, saved_kv)
    restored = _teacher_forced(engine, 5, answer, _prefill(engine, 5, prompt[HISTORY:], 512))

    agreement = Agreement()
    agreement.add(restored, whole)
    assert not agreement.complaints(limits, None)
    best = whole.topk(2, dim=-1).values
    is_clear = best[:, 0] - best[:, 1] > 2 * limits.logits
    assert is_clear.sum() > ANSWER // 4, "the comparison of tokens says nothing"
    assert torch.equal(restored.argmax(-1)[is_clear], whole.argmax(-1)[is_clear])


def _kv_of(engine: HCacheEngine, uid: int, layer_idx: int) -> torch.Tensor:
    geometry = engine.geometry
    out = torch.empty(HISTORY, 2, geometry.num_kv_heads, geometry.head_size, dtype=engine.dtype)
    engine.target(uid).read_kv(layer_idx, 0, out)
    return out
