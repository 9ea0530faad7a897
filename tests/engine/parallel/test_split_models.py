"""A model that is split over ranks says what the whole one says, for every family.

Sums over ranks round differently from one long sum, so bits are not the measure. float32: logits within `CLOSE` of
their scale, and equal tokens wherever the two best logits are further apart than that. 16-bit: as close to float32 as
the whole model is, give or take (a partial sum is rounded once more before it is summed).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mii_hcache.engine.parallel.group import RankGroup
from mii_hcache.engine.parallel.shards import heads_of, split_refusal
from tests.engine.parallel.forked import context
from tests.engine_kit import ALL_MODELS, VOCAB, _tiny_config, greedy, poisoned_engine

CLOSE = 2e-5
SIXTEEN_BIT_MODELS = ("llama", "llama-gqa", "opt", "qwen3", "gemma", "mixtral")
PROMPT = random.Random(5).choices(range(3, VOCAB), k=150)
NUM_TOKENS = 24


def _forced(engine: Any, uid: int, answer: list[int]) -> torch.Tensor:
    """Logits `[len(answer), vocab]` behind the prompt and each token of an answer that is given."""
    rows = [engine.put([uid], [torch.tensor(PROMPT)])[0].float()]
    for token_id in answer[:-1]:
        rows.append(engine.put([uid], [torch.tensor([token_id])])[0].float())
    return torch.stack(rows)


def _run(directory: str, rank: int, size: int, models: dict[str, str], out: str) -> None:
    """Every rank calls the same; rank 0 writes what came out."""
    torch.set_num_threads(1)
    group = RankGroup.join(Path(directory), rank, size, torch.device("cpu"))
    said = {}
    for name, path in models.items():
        engine = poisoned_engine(Path(path), num_blocks=60, group=group)
        said[name] = greedy(engine, 7, PROMPT, NUM_TOKENS, 64)
        if name in SIXTEEN_BIT_MODELS:
            engine = poisoned_engine(Path(path), num_blocks=60, group=group, dtype="bfloat16")
            said[name, "bfloat16"] = _forced(engine, 7, said[name][0])
    if rank == 0:
        torch.save(said, out)


def _greedy_of(logits: torch.Tensor) -> list[int]:
    return logits.argmax(-1).tolist()


@pytest.fixture(scope="module", params=[2, 4])
def split(request, tiny_model, tmp_path_factory):
    """What all models said at N = 2 and 4."""
    root, size = tmp_path_factory.mktemp("ranks"), request.param
    models = {name: str(tiny_model(name)) for name in ALL_MODELS}
    out = root / "said.pt"
    ranks = [context.Process(target=_run, args=(str(root), rank, size, models, str(out))) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(500)
        assert process.exitcode == 0
    return torch.load(out)


@pytest.fixture(scope="module")
def whole(tiny_model):
    """Tokens and logits of the whole models."""
    return {
        name: greedy(poisoned_engine(tiny_model(name), num_blocks=60), 7, PROMPT, NUM_TOKENS, 64) for name in ALL_MODELS
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ALL_MODELS)
def test_float32_tokens_are_those_of_the_whole_model(split, whole, family):
    tokens, logits = whole[family]
    split_tokens, split_logits = split[family]
    bound = CLOSE * float(logits.abs().max())
    best = logits.topk(2, dim=-1).values
    near_ties = (best[:, 0] - best[:, 1] <= 2 * bound).nonzero().flatten().tolist()
    stop = next((at for at in near_ties if tokens[at] != split_tokens[at]), NUM_TOKENS)
    assert stop > NUM_TOKENS // 2, "too early a near-tie: this model proves nothing"
    assert split_tokens[:stop] == tokens[:stop]
    difference = float((split_logits[:stop] - logits[:stop]).abs().max())
    assert 0 < difference <= bound, f"{difference} of {bound}; no difference at all would mean that nothing was split"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", SIXTEEN_BIT_MODELS)
def test_bfloat16_is_as_close_to_float32_as_the_whole_model(split, whole, tiny_model, family):
    tokens, logits = whole[family]
    own = _forced(poisoned_engine(tiny_model(family), num_blocks=60, dtype="bfloat16"), 7, tokens)
    noise = (own - logits).square().mean().sqrt()
    difference = (split[family, "bfloat16"] - logits).square().mean().sqrt()
    assert 0 < difference <= 1.5 * noise, f"{difference} where the whole model has {noise}"


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (8, 2), (14, 2), (32, 8), (16, 1)])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_heads_are_dealt_out_once_and_near_their_kv_head(num_heads, num_kv_heads, size):
    ratio, dealt = num_heads // num_kv_heads, []
    for rank in range(size):
        heads, kv_heads = heads_of(rank, size, num_heads, num_kv_heads)
        dealt += heads
        assert len(heads) > 0 and {head // ratio for head in heads} == set(kv_heads)
    assert dealt == list(range(num_heads))


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("llama", 16, "it has 8 heads"),
        ("llama", 3, "its 8 kv heads are no multiple of that"),
        ("llama-gqa", 3, "no multiple of its 2 kv heads"),
        ("qwen3", 8, None),
        ("opt", 2, None),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(name, size, reason):
    told = split_refusal(_tiny_config(name), size)
    assert told is None if reason is None else reason in told
