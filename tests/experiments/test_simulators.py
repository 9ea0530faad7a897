"""What a simulation must obey: the planner's makespan, conservation, limits of load, and the same numbers again."""

from __future__ import annotations

import itertools
import json
from statistics import fmean

import pytest

from experiments.common.models import MODELS, main_deployment, with_ssds
from experiments.common.reuse import lru_hits, zipf_weights
from experiments.common.servers import server_of
from experiments.common.serving import Served, serve
from experiments.common.simulator import layer_timeline, makespan_s, restored, speed, stored
from experiments.common.workloads import (
    MissingData,
    Round,
    Session,
    leval_questions,
    synthetic_histories,
    synthetic_sessions,
)
from mii_hcache.core.platforms import PLATFORMS

SERVER = server_of("Llama2-7B")
SERIES = ("Recomputation", "KV Offload", "HCache", "Ideal")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("series", ["KV Offload", "HCache", "HCache-O", "Naive Hybrid"])
def test_a_timeline_ends_when_the_plan_says(model, series):
    deployment = main_deployment(model)
    intervals = layer_timeline(deployment.cost, stored(deployment, series).kinds, 1024)
    assert makespan_s(intervals) == pytest.approx(restored(deployment, series, 1024).timeline.makespan_s)
    for resource in ("read", "compute"):
        ordered = sorted((one for one in intervals if one.resource == resource), key=lambda one: one.start_s)
        assert all(one.stop_s <= after.start_s + 1e-12 for one, after in itertools.pairwise(ordered))


def test_more_disks_are_not_slower():
    cost = [with_ssds(PLATFORMS["a100-4ssd"], count).layer_cost(MODELS["Llama2-7B"]) for count in (1, 2, 3, 4)]
    assert all(fast.io_kv_s <= slow.io_kv_s for slow, fast in itertools.pairwise(cost))
    deployment = main_deployment("Llama2-13B")
    assert (
        speed(deployment, "HCache", 1024)
        > speed(deployment, "KV Offload", 1024)
        > speed(deployment, "Recomputation", 1024)
    )


def one_round(start_s: float = 0.0, history: int = 3000) -> Session:
    return Session(start_s=start_s, rounds=(Round(history_tokens=history, prompt_tokens=67, output_tokens=20),))


@pytest.mark.parametrize("series", SERIES)
def test_an_idle_server_is_the_single_request(series):
    done = serve(SERVER, series, [one_round(100.0 * idx) for idx in range(5)])
    assert [one.ttft_s for one in done] == pytest.approx([SERVER.first_token_s(series, 3000, 67)] * 5)
    assert done[0].tbt_s == pytest.approx(SERVER.step_s(1, 3077, []), rel=0.01)


@pytest.mark.parametrize("series", SERIES)
def test_nothing_is_lost_and_order_is_kept(series):
    sessions = synthetic_sessions(80, 1.0, seed=3)
    done = serve(SERVER, series, sessions)
    assert len(done) == sum(len(session.rounds) for session in sessions)
    for one in done:
        assert one.arrived_s <= one.admitted_s < one.first_token_s <= one.finished_s
    by_session: dict[int, list[Served]] = {}
    for one in done:
        by_session.setdefault(one.session_idx, []).append(one)
    for rounds in by_session.values():
        assert [one.round_idx for one in rounds] == list(range(len(rounds)))
        assert all(b.arrived_s == pytest.approx(a.finished_s + 30) for a, b in itertools.pairwise(rounds))


def test_memory_is_never_overbooked():
    done = serve(SERVER, "HCache", synthetic_sessions(150, 3.0, seed=1))
    events = [(one.admitted_s, one.need_tokens) for one in done] + [(one.finished_s, -one.need_tokens) for one in done]
    used = 0
    for _, tokens in sorted(events):  # at equal times what is freed comes first
        used += tokens
        assert 0 <= used <= SERVER.kv_capacity_tokens
    assert used == 0
    with pytest.raises(ValueError, match="must fit"):
        serve(SERVER, "HCache", [one_round(history=60_000)])


def test_beyond_capacity_the_queue_grows():
    def late_over_early(rounds_per_s: float) -> float:
        done = serve(SERVER, "HCache", [one_round(idx / rounds_per_s) for idx in range(400)])
        waits = [one.admitted_s - one.arrived_s for one in sorted(done, key=lambda one: one.arrived_s)]
        return fmean(waits[300:]) - fmean(waits[:100])

    assert late_over_early(1.0) == pytest.approx(0.0, abs=0.05)
    assert late_over_early(200.0) > 1.0


def test_a_seed_decides_everything():
    def times(seed: int) -> list[float]:
        return [one.finished_s for one in serve(SERVER, "HCache", synthetic_sessions(60, 1.0, seed=seed))]

    assert times(5) == times(5) != times(6)


def test_synthetic_histories_follow_figure_3():
    rounds = [one for session in synthetic_sessions(5000, 1.0, seed=0) for one in session.rounds]
    histories = sorted(one.history_tokens for one in rounds)
    assert histories[len(histories) // 2] == pytest.approx(2582, rel=0.15)
    drawn = sorted(synthetic_histories(5000, seed=0))
    assert drawn[2500] == pytest.approx(2582, rel=0.1) and drawn[-1] <= 16384


def test_an_lru_cache_at_its_limits():
    lengths = [100] * 10
    everything = lru_hits(lengths, zipf_weights(10, 0.0), 1000, 500, seed=0)
    nothing = lru_hits(lengths, zipf_weights(10, 0.0), 99, 500, seed=0)
    assert all(is_hit for _, is_hit in everything) and not any(is_hit for _, is_hit in nothing)
    half = fmean(is_hit for _, is_hit in lru_hits(lengths, zipf_weights(10, 0.0), 500, 5000, seed=0))
    assert half == pytest.approx(0.5, abs=0.03)
    assert sum(zipf_weights(7, 1.4)) == pytest.approx(1)


def test_data_is_read_as_published_or_asked_for(tmp_path):
    with pytest.raises(MissingData, match="L-Eval"):
        leval_questions(tmp_path)
    header = "task,doc,query,context_tokens,input_tokens,output_tokens\n"
    (tmp_path / "lengths_llama2.csv").write_text(header + "gsm100,0,0,5451,77,4\n")
    assert [one.context_tokens for one in leval_questions(tmp_path)] == [5451]
    (tmp_path / "lengths_llama2.csv").unlink()
    for task in ("paper_assistant", "gsm100", "quality"):
        line = {"input": "a b c", "instructions": ["q r"], "outputs": ["s"]}
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(line) + "\n")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = leval_questions(tmp_path)
    assert [(one.context_tokens, one.input_tokens, one.output_tokens) for one in found] == [(3, 2, 1)] * 3
