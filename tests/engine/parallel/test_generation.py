"""Several processes serve as one engine: conversations under pressure and log-probabilities are those of N = 1, and the
ranks agree on every block to the end."""

from __future__ import annotations

import os
import queue
import signal
from typing import Any

import pytest

from mii_hcache.engine.ragged_engine import token_tensors
from mii_hcache.errors import HCacheError, RankLostError
from mii_hcache.runtime.generation import FinishReason, GenerationRequest, SamplingParams
from tests.engine.parallel.ranks_kit import parallel_engine
from tests.engine_kit import Client, ToldTap, answers, interleave, open_client, poisoned_engine

TIGHT = {"num_blocks": 36, "max_batch_tokens": 96}
"""Blocks for about two of the five conversations: some are preempted, residents are evicted."""


def _scored(client: Client, prompt: list[int]) -> list[float]:
    """Log-probabilities of the prompt's tokens but the first."""
    told: list[Any] = []
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.service.submit(
        GenerationRequest(
            request_id="scored",
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_new_tokens=1),
            on_token=lambda token_id: False,
            on_finish=done.put,
            num_top_logprobs=2,
            on_prompt_logprobs=told.extend,
        )
    )
    assert done.get(timeout=60).error is None
    assert told[0] is None
    return [entry.logprob for entry in told[1:]]


def _everything(client: Client) -> dict[str, Any]:
    said: dict[str, Any] = {"answers": answers(interleave(client, 5, 3, num_tokens=40))}
    said["sampled"] = client.ask(range(3, 90), 12, temperature=1.0, seed=4).token_ids
    said["scored"] = _scored(client, list(range(5, 305)))  # more rows than are looked at together
    said["metrics"] = client.service.metrics()
    client.service.close()
    return said


@pytest.fixture(scope="module")
def expected(tiny_model):
    return {
        name: _everything(open_client(poisoned_engine(tiny_model(name), **TIGHT), method="recompute"))
        for name in ("llama-gqa", "opt")
    }


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("name", "size"), [("llama-gqa", 2), ("opt", 2), ("llama-gqa", 4)])
def test_ranks_answer_as_one_engine_does(tiny_model, expected, name, size):
    with parallel_engine(tiny_model(name), size, **TIGHT) as engine:
        client = open_client(engine, method="recompute")
        said = _everything(client)
        assert engine.lost is None and engine.num_free_blocks == engine.num_blocks
    assert said["scored"] == pytest.approx(expected[name]["scored"], abs=2e-3)
    for what in ("answers", "sampled"):
        assert said[what] == expected[name][what], what
    metrics = said["metrics"]
    assert metrics["preemptions_total"] > 0 and metrics["evicted_residents_total"] > 0, "there was no pressure"


def test_what_is_refused_is_told_to_nobody(tiny_model):
    with parallel_engine(tiny_model("llama"), 2, num_blocks=8) as engine:
        for refused in (
            lambda: engine.reserve(1, 9 * 16),
            lambda: engine.put([1], token_tensors([[3] * 200])),
            lambda: engine.truncate(1, 5),
        ):
            with pytest.raises(HCacheError):
                refused()
        engine.reserve(2, 32)
        engine.target(2).fill(0, token_tensors([list(range(3, 35))])[0], engine.geometry.num_layers)
        engine.target(2).commit(32)
        with pytest.raises(HCacheError, match="tokens already"):
            engine.target(2).commit(32)
        filled = engine.put([2], token_tensors([[7]]))
        run = engine.put([3], token_tensors([[*range(3, 35), 7]]))
        assert filled.argmax() == run.argmax() and filled.allclose(run, atol=1e-3)
        engine.truncate(2, 20)
        engine.evict(2)
        engine.evict(3)
        assert engine.lost is None


def test_ranks_that_disagree_stop_at_once(tiny_model):
    with parallel_engine(tiny_model("llama"), 2, num_blocks=20) as engine:
        engine.put([1], token_tensors([[3, 4, 5]]))
        engine.allocator.allocate(1)  # behind the others' back
        with pytest.raises(RankLostError, match=r"rank 1 of 2 .* holds other blocks than rank 0"):
            for _ in range(3):
                engine.put([1], token_tensors([[6]]))
        with pytest.raises(RankLostError, match="holds other blocks"):
            engine.evict(1)


def test_the_death_of_a_rank_is_noticed_by_who_does_nothing(tiny_model):
    told: queue.SimpleQueue[RankLostError] = queue.SimpleQueue()
    with parallel_engine(tiny_model("llama"), 2, num_blocks=20, on_lost=told.put) as engine:
        client = open_client(engine, method="recompute")
        assert client.service.rank_states == {0: "ready", 1: "ready"}
        os.kill(engine.followers.pids[0], signal.SIGKILL)
        error = told.get(timeout=60)
        assert "rank 1 of 2" in str(error) and "was killed by SIGKILL" in str(error)
        client.service.lose(error)  # who opened the engine passes it on
        assert not client.service.is_alive and client.service.rank_states[1] == "gone"
        with pytest.raises(HCacheError, match="was killed by SIGKILL"):
            client.send([3, 4, 5], 4)
        client.service.close()


def test_ranks_that_were_told_to_end_are_not_missed(tiny_model):
    with parallel_engine(tiny_model("llama"), 2, num_blocks=20) as engine:
        end = engine.followers.end

        def end_late() -> None:
            engine.followers._watcher.join(60)  # the watching thread has seen that all are gone
            end()

        engine.followers.end = end_late
        engine.close()
        assert engine.lost is None and engine.rank_states[1] == "gone"


def test_a_step_that_fails_here_only_is_the_engines_end(tiny_model):
    with parallel_engine(tiny_model("llama"), 2, num_blocks=20) as engine:

        def fail(layer_idx: int, hidden: object) -> None:
            raise MemoryError("no room for rows")

        client = open_client(engine, method="recompute")
        engine.model().qkv_input_tap = ToldTap(fail)
        result = client.send([3, 4, 5], 4).get(timeout=30)
        assert result.finish_reason is FinishReason.ERROR
        assert "rank 0 failed in 'put': no room for rows" in str(result.error)
        assert not client.service.is_alive
        with pytest.raises(HCacheError, match="no room for rows"):
            client.send([3, 4, 5], 4)
        client.service.close()
