"""A norm writes a layer's QKV input where it is saved from, and the projection reads it there: no copy, same bits."""

from __future__ import annotations

import random
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.identity import spans_of
from mii_hcache.core.plans import StoragePlan
from mii_hcache.engine.ragged_engine import HCacheEngine, token_tensors
from mii_hcache.runtime.capture import StepCapture
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import HostStream, HostStreams, Stream, Streams
from tests import stock_kernels
from tests.engine_kit import VOCAB, poisoned_engine, save_tiny_model
from tests.runtime.kit import GIVE_UP_S, FakeStore

NUM_LAYERS = 2
SHAPE = {"num_hidden_layers": NUM_LAYERS, "hidden_size": 256, "num_attention_heads": 4}
FAMILIES = {
    "llama-gqa": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 4, "head_dim": 64},
    "opt": {"word_embed_proj_dim": 256, "ffn_dim": 512},
}
STEPS = (130, 70, 1, 1, 1, 40, 13)
"""Tokens of each, 256 in all."""


class LikeDevice(Streams):
    """Rows take the way over a stage; everything is done at once."""

    has_own_memory = True

    def __init__(self) -> None:
        self.main = HostStream()

    def new(self, *, is_urgent: bool = False) -> Stream:
        return HostStream()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")

    def path_of(family: str):
        if not (root / family).exists():
            save_tiny_model(family, root / family, **SHAPE, **FAMILIES[family])
        return root / family

    return path_of


class Session:
    """One sequence of the same tokens each time; what its projections read is kept."""

    def __init__(self, engine: HCacheEngine, streams: Streams) -> None:
        self.engine = engine
        self.store = FakeStore()
        self.counters = Counters()
        kinds = (ChunkKind.HIDDEN,) * NUM_LAYERS
        self.saver = Saver(
            adapter=engine,
            store=self.store,
            plan=StoragePlan(method="test", kinds=kinds),
            max_batch_tokens=300,
            counters=self.counters,
            save_wait=1000.0,
            streams=streams,
        )
        self.capture = self.saver._capture
        assert self.capture is not None
        self.read: list[list[torch.Tensor]] = [[] for _ in range(NUM_LAYERS)]
        self.num_in_place = 0
        self.tokens = random.Random(3).choices(range(3, VOCAB), k=sum(STEPS))

    def run(self, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
        model = self.engine.model()
        project = model.project_qkv

        def watched(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
            layer_idx = next(idx for idx, one in enumerate(model.layers) if one is layer)
            self.num_in_place += any(hidden is rows for rows in self.capture._rows)
            before = hidden.clone()
            qkv = project(layer, hidden)
            assert torch.equal(hidden, before)
            self.read[layer_idx].append(before)
            return qkv

        monkeypatch.setattr(model, "project_qkv", watched)
        model.qkv_input_tap = self.saver
        self.saver.open(1, seed=b"s", token_ids=[])
        logits, at = [], 0
        for num_tokens in STEPS:
            tokens = self.tokens[at : at + num_tokens]
            at += num_tokens
            assert self.saver.drain(GIVE_UP_S)
            self.saver.begin_step([StepSegment(uid=1, token_ids=tokens)])
            for rows in self.capture._rows:
                rows.fill_(float("nan"))
            logits.append(self.engine.put([1], token_tensors([tokens])))
            self.saver.end_step()
        assert self.saver.drain(GIVE_UP_S)
        self.saver.stop()
        model.qkv_input_tap = None
        self.engine.evict(1)
        monkeypatch.undo()
        return torch.cat(logits)

    def assert_saved_what_was_read(self) -> None:
        assert self.counters.get("save_errors_total") == self.counters.get("dropped_rows_total") == 0
        spans = list(spans_of(b"s", self.tokens))
        for layer_idx, parts in enumerate(self.read):
            saved = b"".join(self.store.spans[span_id][1][layer_idx] for span_id, _ in spans)
            wanted = torch.cat(parts)
            assert saved == wanted.view(torch.uint8).numpy().tobytes() and torch.isfinite(wanted).all()


def _without_saving(engine: HCacheEngine, tokens: list[int]) -> torch.Tensor:
    logits, at = [], 0
    for num_tokens in STEPS:
        logits.append(engine.put([9], token_tensors([tokens[at : at + num_tokens]])))
        at += num_tokens
    engine.evict(9)
    return torch.cat(logits)


@pytest.mark.parametrize("way", [HostStreams, LikeDevice])
@pytest.mark.parametrize(
    ("kernels", "family", "dtype"),
    [
        ("portable", "llama-gqa", "float32"),
        ("portable", "llama-gqa", "bfloat16"),
        ("portable", "mixtral", "bfloat16"),
        ("portable", "gemma", "bfloat16"),
        ("portable", "opt", "float16"),
        ("triton", "llama-gqa", "float16"),
        ("triton", "opt", "float16"),
        ("stock", "llama-gqa", "float16"),
        ("stock", "opt", "float16"),
    ],
)
def test_what_is_saved_is_what_the_projection_read_and_nothing_is_copied(
    model_dir, monkeypatch, kernels, family, dtype, way
):
    if kernels == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed (pip install 'mii-hcache[test]')")
    with pytest.MonkeyPatch.context() as installed:
        if kernels == "stock":
            stock_kernels.install(installed)
        engine = poisoned_engine(model_dir(family), dtype=dtype, kernels=kernels, num_blocks=64, max_batch_tokens=300)
        session = Session(engine, way())
        plain = _without_saving(engine, session.tokens)
        monkeypatch.setattr(type(session.capture), "_copy", lambda *args: pytest.fail("a layer was copied"))
        saved = session.run(monkeypatch)
    assert session.num_in_place == NUM_LAYERS * len(STEPS)
    assert torch.equal(saved, plain), "saving changed what the model says"
    session.assert_saved_what_was_read()


@pytest.mark.parametrize("way", [HostStreams, LikeDevice])
def test_a_norm_that_writes_elsewhere_is_copied_from(model_dir, monkeypatch, way):
    engine = poisoned_engine(model_dir("llama-gqa"), dtype="bfloat16", num_blocks=64, max_batch_tokens=300)
    session = Session(engine, way())
    plain = _without_saving(engine, session.tokens)
    monkeypatch.setattr(StepCapture, "rows_for", lambda *args: None)
    saved = session.run(monkeypatch)
    assert session.num_in_place == 0
    assert torch.equal(saved, plain)
    session.assert_saved_what_was_read()
