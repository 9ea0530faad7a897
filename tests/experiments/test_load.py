"""The load generator: what is asked and when, what its numbers mean, and a run against a real server."""

from __future__ import annotations

import asyncio
import json
import math
import selectors
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, pstdev
from types import SimpleNamespace

import pytest

from experiments.common import load as load_module
from experiments.common.load import FIRST_ID, VOCABULARY, Load, drive, main, prepare, run_load, warm_up
from experiments.common.load_client import Answer, Client
from experiments.common.load_summary import Asked, Objective, num_waiting, percentile, queue_grows, summary_of
from experiments.common.served import Served, serving
from experiments.common.workloads import Round, Session, midway_sessions, scaled


def a_session(start_s: float = 0.0, history: int = 128, num_rounds: int = 2) -> Session:
    rounds = []
    for _ in range(num_rounds):
        rounds.append(Round(history_tokens=history, prompt_tokens=7, output_tokens=5))
        history += 12
    return Session(start_s=start_s, rounds=tuple(rounds))


class Skipping(selectors.DefaultSelector):
    """Nobody waits: when there is nothing to do, time goes on to what comes next."""

    now_s = 0.0

    def select(self, timeout=None):
        found = super().select(0)
        if not found:
            assert timeout is not None, "nothing will ever happen again"
            self.now_s += timeout
        return found


class SimulatedTime(asyncio.SelectorEventLoop):
    """An event loop whose seconds pass at once, and on no machine longer than they should."""

    def __init__(self) -> None:
        self._skipping = Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now_s


@pytest.fixture
def simulated(monkeypatch) -> Callable[..., tuple[list[Asked], float]]:
    """`simulated(client, load)`: what `drive` returns, and how many seconds passed."""

    def run(client: FakeClient, load: Load) -> tuple[list[Asked], float]:
        loop = SimulatedTime()
        monkeypatch.setattr(load_module, "time", SimpleNamespace(perf_counter=loop.time))
        try:
            return loop.run_until_complete(drive(client, load)), loop.time()
        finally:
            loop.close()

    return run


class FakeClient:
    """Answers with ids of its own after a while, and remembers what it was asked and when."""

    def __init__(self, takes_s: float = 0.0, error: str = "") -> None:
        self.asked: list[tuple[float, list[int], int]] = []
        self._takes_s = takes_s
        self._error = error

    async def ask(self, prompt, num_tokens, *, salt=""):
        sent_s = asyncio.get_running_loop().time()
        self.asked.append((sent_s, list(prompt), num_tokens))
        await asyncio.sleep(self._takes_s)
        now_s = asyncio.get_running_loop().time()
        ids = tuple(range(3000, 3000 + num_tokens))
        return Answer(
            sent_s=sent_s,
            finished_s=now_s,
            token_times_s=(now_s,) * num_tokens,
            token_ids=ids,
            hcache={"restored_tokens": 64, "method": "kv"},
            error=self._error,
        )

    async def until_saved(self, limit_s=60.0):
        pass


# --- what is asked, and when ------------------------------------------------------------------------------------------


def test_arrivals_are_poisson_and_the_seeds():
    sessions = midway_sessions(3000, 2.0, rounds_each=1, seed=4)
    assert sessions == midway_sessions(3000, 2.0, rounds_each=1, seed=4)
    assert sessions != midway_sessions(3000, 2.0, rounds_each=1, seed=5)
    starts = [session.start_s for session in sessions]
    gaps = [after - before for before, after in pairwise(starts)]
    assert fmean(gaps) == pytest.approx(0.5, rel=0.06)
    assert pstdev(gaps) == pytest.approx(fmean(gaps), rel=0.08)  # of an exponential; regular arrivals have 0
    assert sum(gap > 1.0 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-2), abs=0.02)


def test_a_rate_is_of_rounds_and_changes_nothing_but_times():
    slow, fast = (midway_sessions(400, rate, rounds_each=3, seed=0) for rate in (0.5, 2.0))
    assert [session.rounds for session in slow] == [session.rounds for session in fast]
    assert sum(len(session.rounds) for session in slow) == 400
    assert slow[-1].start_s == pytest.approx(4 * fast[-1].start_s)
    assert Load(sessions=tuple(slow), think_s=0).offered_rounds_per_s == pytest.approx(0.5, rel=0.2)


def test_sessions_begin_in_the_middle_with_the_papers_histories():
    sessions = midway_sessions(4000, 1.0, rounds_each=1, seed=1)
    histories = sorted(session.rounds[0].history_tokens for session in sessions)
    assert histories[len(histories) // 2] == pytest.approx(2582, rel=0.15)  # the median of figure 3b
    for session in midway_sessions(300, 1.0, rounds_each=4, seed=1):
        for one, after in pairwise(session.rounds):
            assert after.history_tokens == one.history_tokens + one.prompt_tokens + one.output_tokens


def test_scaled_sessions_still_add_up():
    sessions = midway_sessions(200, 1.0, rounds_each=4, seed=2)
    short = scaled(sessions, tokens=1 / 16, time=0.5)
    for before, after in zip(sessions, short, strict=True):
        assert after.start_s == before.start_s / 2
        assert after.rounds[0].history_tokens == round(before.rounds[0].history_tokens / 16)
        for one, other in pairwise(after.rounds):
            assert other.history_tokens == one.history_tokens + one.prompt_tokens + one.output_tokens
        assert all(one.prompt_tokens >= 1 and one.output_tokens >= 1 for one in after.rounds)


def test_prompts_are_exactly_what_was_said(simulated):
    load = Load(sessions=(a_session(num_rounds=3),), think_s=0.0, seed=3, name="x")
    client = FakeClient()
    done, _ = simulated(client, load)
    history = load.history(0)
    assert len(history) == 128 and all(FIRST_ID <= token_id < VOCABULARY for token_id in history)
    said = list(history)
    for round_idx, (_, prompt, num_tokens) in enumerate(client.asked):
        one = load.sessions[0].rounds[round_idx]
        said += load.ids(0, str(round_idx), 7)
        assert prompt == said and len(prompt) == one.history_tokens + one.prompt_tokens
        assert num_tokens == one.output_tokens == 5
        said += range(3000, 3005)
    assert len(client.asked) == len(done) == 3
    other = Load(sessions=load.sessions, think_s=0.0, seed=3, name="y")
    assert other.history(0) == history and other.ids(0, "0", 7) != load.ids(0, "0", 7)


def test_rounds_wait_for_the_answer_and_the_time_to_think(simulated):
    load = Load(sessions=(a_session(0.1), a_session(0.15)), think_s=0.2)
    client = FakeClient(takes_s=0.1)
    done, _ = simulated(client, load)
    first, second, *later = sorted(done, key=lambda one: one.due_s)
    assert (first.due_s, second.due_s) == (0.1, 0.15)  # the second did not wait for the first
    assert second.finished_s is not None and second.sent_s is not None
    assert second.sent_s < first.finished_s
    for before, after in zip((first, second), later, strict=True):
        assert after.due_s == pytest.approx(before.finished_s + 0.2)
        assert after.sent_s == pytest.approx(after.due_s) and after.ttft_s == pytest.approx(0.1)


def test_a_failed_round_ends_its_session_and_the_limit_ends_all(simulated):
    failed, _ = simulated(FakeClient(error="no"), Load(sessions=(a_session(),), think_s=0.0))
    assert [(one.error, one.finished_s) for one in failed] == [("no", None)]
    stuck = Load(sessions=(a_session(), a_session(30.0)), think_s=0.0, limit_s=0.3)
    late, passed_s = simulated(FakeClient(takes_s=20.0), stuck)
    assert passed_s == pytest.approx(0.3)
    assert [(one.session_idx, one.finished_s, one.error) for one in late] == [(0, None, "")]


def test_histories_are_asked_for_before_and_the_warm_up_is_its_own():
    load = Load(sessions=(a_session(), a_session(history=0), a_session(history=64)), think_s=0.0)
    client = FakeClient()
    asyncio.run(prepare(client, load))
    assert [(prompt, count) for _, prompt, count in client.asked] == [(load.history(0), 1), (load.history(2), 1)]
    client.asked.clear()
    asyncio.run(warm_up(client, load))
    assert len(client.asked) == 3
    assert client.asked[1][1][: len(client.asked[0][1])] == client.asked[0][1]  # the second goes on with the first
    assert all(prompt[:64] != load.history(idx)[:64] for _, prompt, _ in client.asked for idx in (0, 2))
    with pytest.raises(RuntimeError, match="no server"):
        asyncio.run(prepare(FakeClient(error="no server"), load))


def test_only_this_machine_is_asked():
    with pytest.raises(ValueError, match="on this machine"):
        Client("http://example.com:8000")


# --- what the numbers mean --------------------------------------------------------------------------------------------


def asked(due_s: float, *times_s: float, session_idx: int = 0, round_idx: int = 0, error: str = "") -> Asked:
    """Finished with its last token, unless it failed or has none."""
    return Asked(
        session_idx=session_idx,
        round_idx=round_idx,
        round=Round(history_tokens=0, prompt_tokens=1, output_tokens=len(times_s)),
        due_s=due_s,
        sent_s=due_s,
        token_times_s=times_s,
        finished_s=times_s[-1] if times_s and not error else None,
        error=error,
    )


def test_percentiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, share) for share in (0.0, 0.2, 0.5, 0.99, 1.0)] == [1, 1, 3, 5, 5]
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([float(idx) for idx in range(1, 101)], 0.99) == 99
    assert math.isnan(percentile([], 0.5))


def test_a_summary_of_hand_made_rounds():
    rounds = [
        asked(0.0, 1.0, 1.1, 1.3),  # ttft 1.0, gaps 0.1 0.2: mean 0.15
        asked(1.0, 1.5, 1.6),  # ttft 0.5, gap 0.1
        asked(2.0, 6.0),  # ttft 4.0: too late, no gaps
        asked(3.0, 3.1, 4.1),  # ttft 0.1, gap 1.0: too slow
        asked(4.0, 4.2, error="broke"),
    ]
    summary = summary_of(rounds, 1.0, Objective(ttft_s=1.0, tbt_s=0.16))
    assert summary.ttft_mean_s == pytest.approx((1.0 + 0.5 + 4.0 + 0.1 + 0.2) / 5)
    assert (summary.ttft_p50_s, summary.ttft_p99_s) == pytest.approx((0.5, 4.0))
    assert summary.tbt_mean_s == pytest.approx((0.15 + 0.1 + 1.0) / 3)
    assert (summary.tbt_p50_s, summary.tbt_p99_s) == pytest.approx((0.1, 1.0))
    assert (summary.goodput, summary.num_failed, summary.num_unfinished) == (2 / 5, 1, 0)
    assert summary.achieved_rounds_per_s == pytest.approx(4 / 6.0)
    later = summary_of(rounds, 1.0, Objective(ttft_s=1.0, tbt_s=0.16), warm_up=0.5)
    assert later.num_counted == 3 and later.ttft_p50_s == pytest.approx(0.2)


def test_goodput_counts_what_was_not_over():
    rounds = [asked(0.0, 0.1, 0.2), asked(1.0)]
    summary = summary_of(rounds, 1.0, Objective(ttft_s=1.0, tbt_s=1.0))
    assert (summary.goodput, summary.num_unfinished, summary.is_saturated) == (0.5, 1, True)


def test_a_growing_queue_is_saturation_and_a_steady_one_is_not():
    steady = [asked(float(idx), idx + 2.5, idx + 3.0, session_idx=idx) for idx in range(40)]
    growing = [asked(float(idx), 3.0 * idx + 3.0, session_idx=idx) for idx in range(40)]
    assert num_waiting(steady, 10.0) == 3 and num_waiting(growing, 10.0) > 6
    assert not queue_grows(steady) and queue_grows(growing)
    objective = Objective(ttft_s=9.0, tbt_s=9.0)
    assert not summary_of(steady, 1.0, objective).is_saturated and summary_of(growing, 1.0, objective).is_saturated


# --- against a real server --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    from mii_hcache.engine.demo_model import ensure_demo_model

    model_dir = ensure_demo_model(tmp_path_factory.mktemp("demo"))
    with serving(Served(model_dir=model_dir, series="KV Offload", num_blocks=400)) as url:
        yield url


def test_a_real_server_gives_back_what_was_planned(url):
    load = Load(sessions=tuple(a_session(0.1 * idx, history=200) for idx in range(4)), think_s=0.05, seed=9)
    done = run_load(url, load)
    assert len(done) == load.num_rounds == 8 and not any(one.error for one in done)
    for one in done:
        assert len(one.token_times_s) == one.round.output_tokens == 5
        assert list(one.token_times_s) == sorted(one.token_times_s) and one.ttft_s > 0
        restorable = one.round.history_tokens // 64 * 64
        assert one.way == "kv" and one.hcache["restored_tokens"] == restorable
        counts = [one.hcache[f"{name}_tokens"] for name in ("resident", "restored", "recomputed", "prefill")]
        assert sum(counts) == one.round.history_tokens + one.round.prompt_tokens
        assert 0 < one.hcache["ttft_ms"] / 1e3 < one.ttft_s  # the server's own clock starts later
    gaps_s = [gap_s for one in done for gap_s in one.gaps_s]
    assert sum(gap_s > 0 for gap_s in gaps_s) > len(gaps_s) / 2  # tokens come one by one, not all in the end


def test_the_command(url, capsys):
    arguments = ["--url", url, "--rate", "8", "--rounds", "4", "--think", "0.1", "--lengths", "0.02"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["summary"]["num_counted"] <= len(told["rounds"]) == 4
    assert all(len(one["token_times_s"]) == one["round"]["output_tokens"] for one in told["rounds"])
    assert main(arguments) == 0
    words = capsys.readouterr().out
    assert "first token" in words and "goodput" in words and "rounds/s offered" in words
    assert load_module.__doc__ is not None and "aiperf" in load_module.__doc__


def test_without_a_server_it_says_so(capsys):
    assert main(["--url", "http://127.0.0.1:9", "--rate", "1", "--rounds", "2", "--json"]) == 2
    assert main(["--url", "http://example.com", "--rate", "1"]) == 2
    words = capsys.readouterr().err
    assert "did not answer" in words and "on this machine" in words and "Traceback" not in words


def test_a_wrong_request_is_an_error_not_a_crash(url):
    async def ask() -> Answer:
        async with Client(url) as client:
            return await client.ask([10**6], 2)

    answer = asyncio.run(ask())
    assert answer.error.startswith("ValueError: 400") and answer.token_ids == ()
