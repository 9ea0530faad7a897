"""Exactness and figure 14 on the machine at hand: the arithmetic, the doubles, and tiny runs that must agree."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.common.item import Context
from experiments.common.random_weights import random_engine
from experiments.common.rows import Row
from experiments.common.workloads import MissingData, leval_documents
from experiments.exactness import here
from experiments.exactness.agreement import Distance, Load, measure, rows
from experiments.exactness.config import NOISE, RESIDENT
from experiments.exactness.contexts import WAYS
from experiments.exactness.scores import SCORES, choice, number, rouge
from experiments.fig14_saving import decoding
from experiments.fig14_saving import here as saving_here
from mii_hcache.config import SAVE_NAMES
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.engine.demo_model import ensure_demo_model
from mii_hcache.engine.ragged_engine import SequenceBlocks

LOAD = Load(num_prompts=1, history_tokens=192, tail_tokens=24, answer_tokens=8)


def test_a_flip_counts_where_the_choice_was_clear():
    reference = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.1, 0.0]])
    distance = Distance()
    distance.add(reference.flip(-1), reference)
    assert distance.largest == 3.0 and distance.equal_share == 0.5
    assert distance.missed_gaps == [2.0]
    assert distance.num_flipped(0.9) == 1 and distance.num_flipped(1.1) == 0
    distance.add(torch.full((1, 3), float("nan")), reference[:1])
    assert distance.largest == float("inf")


def demo_engine(**settings):
    return random_engine("demo", **{"dtype": "float32", "num_blocks": 64, "max_batch_tokens": 512, **settings})


@pytest.mark.parametrize("num_kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_is_as_exact_as_the_engine_itself(num_kv_heads, dtype):
    engine = demo_engine(num_kv_heads=num_kv_heads, dtype=dtype)
    assert engine.geometry.num_kv_heads == num_kv_heads
    found = measure(engine, WAYS, LOAD)
    assert set(found.by_way) == {NOISE, *(way.name for way in WAYS)}
    for distance in found.by_way.values():
        assert distance.largest <= found.limits.logits and distance.num_flipped(found.limits.logits) == 0
    told = " ".join(found.told)
    assert "H" in told and "KV" in told and ", 2 layers" in told  # plans of every kind
    assert any(f"recomputed {count} tokens" in told for count in (64, 128))
    made = list(rows(found, x="tiny", machine="here", load=LOAD))
    assert {row.panel for row in made} == set("abcd") and all(row.how == "measured" for row in made)


def test_a_wrong_restore_shows(monkeypatch):
    engine = demo_engine()
    write = SequenceBlocks.write_kv

    def swapped(self, layer_idx, start, kv, stream):
        kv = torch.stack([kv[:, 0], kv[:, 1].roll(1, 0)], dim=1) if layer_idx == 2 else kv
        write(self, layer_idx, start, kv, stream)

    monkeypatch.setattr(SequenceBlocks, "write_kv", swapped)
    found = measure(engine, [way for way in WAYS if way.name == "kv"], LOAD)
    assert found.by_way["kv"].largest > found.limits.logits


def test_scores_are_l_evals():
    assert choice("The answer is (B).") == "B" and choice("none of them") == "A"
    assert SCORES["quality"](["B", "(C) no"], ["(B) Because", "(D) Since"]) == 50
    assert number("So 3 x 4. The answer is 1,234.50") == "1234" and number("It is 12 dollars\n\n99") == "12"
    assert number("nothing") == "" and SCORES["gsm100"](["The answer is 18."], ["18"]) == 100
    assert rouge(["the cat sat"], ["The cat sat!"]) == pytest.approx(100)
    assert rouge(["a dog"], ["the cat sat"]) == 0
    # ROUGE-1 2/3, ROUGE-2 1/2 and ROUGE-L 2/3 by hand: three words each, two in common
    assert rouge(["the cat ran"], ["the cat sat"]) == pytest.approx(100 * (2 / 3 * 1 / 2 * 2 / 3) ** (1 / 3))


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A checkpoint with a tokenizer, named as a user would."""
    path = ensure_demo_model(tmp_path)
    monkeypatch.setenv("MII_HCACHE_MODEL", str(path))
    return path


def leval_rows(data) -> dict[str, list[Row]]:
    cells = here.cells(Context(scale="smoke", data=data))
    assert len(cells) == 4
    return {cell.key.split()[-1]: list(cell.measure()) for cell in cells[1:]}


def test_l_evals_answers_from_restored_contexts(own_model, tmp_path):
    text = "The lighthouse keeper counts the ships of the harbour. " * 40
    body = {"input": text, "instructions": ["Who counts? (A) the keeper (B) nobody"], "outputs": ["(A) the keeper"]}
    (tmp_path / "quality.jsonl").write_text(json.dumps(body) + "\n")
    found = leval_rows(tmp_path)
    scores = {row.series: row.y for row in found["quality"] if row.panel == "e"}
    assert set(scores) == {RESIDENT, "hidden", "kv"} and len(set(scores.values())) == 1
    assert {row.series: row.y for row in found["quality"] if row.panel == "f"} == {"hidden": 1.0, "kv": 1.0}
    assert all("1 questions" in row.note for row in found["quality"])
    assert [row.y for row in found["gsm100"]] == [None, None] and "gsm100.jsonl" in found["gsm100"][0].note


def test_missing_documents_say_what_to_put_where(tmp_path):
    with pytest.raises(MissingData, match=r"quality\.jsonl"):
        leval_documents(tmp_path, "quality")
    with pytest.raises(MissingData):
        leval_documents(None, "quality")


def test_three_ways_to_decode(tmp_path):
    engine = demo_engine(num_blocks=80, max_batch_tokens=128)
    batch = decoding.Batch(engine, num_sequences=3, history_tokens=64)
    num_bytes = 6 * engine.geometry.span_bytes(ChunkKind.HIDDEN)
    saved = [decoding.Saved(engine, tmp_path / save, num_bytes, save) for save in SAVE_NAMES]
    variants = [decoding.Unsaved(engine), *saved]
    try:
        for _ in range(2):
            times_s = batch.take_turn(variants)
            assert set(times_s) == {"Ideal", "HCache", "DirectIO"}
            assert all(len(taken_s) == 4 and min(taken_s) > 0 for taken_s in times_s.values())
        for variant in saved:
            assert variant.num_saved_spans == 6  # every sequence completes a span in every turn
            assert "0 losses" in variant.note
        two_stage, direct = (
            {span_id: span.crcs for span_id, span in one._store._index._spans.items()} for one in saved
        )
        assert len(two_stage) == 6 and two_stage == direct  # the same bytes, written behind the step or within it
    finally:
        for variant in variants:
            variant.close()
        batch.close()
    assert engine.num_free_blocks == engine.num_blocks


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these are measured")
@pytest.mark.parametrize("module", [here, saving_here])
def test_what_needs_a_gpu_says_so(module, monkeypatch):
    monkeypatch.delenv("MII_HCACHE_MODEL", raising=False)
    found = [row for cell in module.cells(Context(scale="paper")) for row in cell.measure()]
    assert found and all(row.y is None and "needs a GPU" in row.note for row in found)
