"""Conversations, bounds and the budget of time, without an engine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.tools.budget import Budget, Round
from mii_hcache.tools.conversation import ANSWER_TOKENS, least_history_tokens, make_conversation
from mii_hcache.tools.limits import Agreement, Limits, noise_of
from mii_hcache.tools.session import relative_difference

EXACT = Limits(dtype=torch.float32, scale=10.0)
COARSE = Limits(dtype=torch.bfloat16, scale=10.0, noise=0.25)


@given(extra=st.integers(0, 3000), num_turns=st.integers(2, 12), vocab_size=st.integers(1, 5000))
def test_the_last_turn_finds_exactly_the_history(extra, num_turns, vocab_size):
    history = least_history_tokens(num_turns) + extra
    talk = make_conversation(history_tokens=history, num_turns=num_turns, vocab_size=vocab_size, seed=1)
    assert talk.num_turns == num_turns and all(talk.messages)
    assert talk.history_tokens == history and talk.num_present(0) == 0
    assert all(0 <= token_id < vocab_size for message in talk.messages for token_id in message)
    talk.answers.extend([0] * ANSWER_TOKENS for _ in range(num_turns))
    for turn in range(num_turns):
        prompt = talk.prompt(turn)
        new = [0] * (turn > 0) + list(talk.messages[turn])  # the last token of an answer was never run
        assert prompt[talk.num_present(turn) :] == new
    assert len(talk.prompt(num_turns - 1)) + ANSWER_TOKENS == talk.num_tokens()


def _rows(*best: float) -> torch.Tensor:
    """Two tokens: the first one's logit is given, the second one's is 5."""
    return torch.tensor([[value, 5.0] for value in best])


def test_equal_answers_have_nothing_to_complain_about():
    agreement = Agreement()
    agreement.add(_rows(6.0, 4.0), _rows(6.0, 4.0))
    assert (agreement.num_equal, agreement.num_tokens) == (2, 2)
    assert agreement.complaints(EXACT, None) == agreement.complaints(COARSE, None) == []


@pytest.mark.parametrize(
    ("limits", "ours", "reference", "complaints"),
    [
        (EXACT, 6.02, 6.0, ["logits differ"]),
        (EXACT, 4.9999, 5.0001, ["1 of 1 tokens differ"]),
        (COARSE, 6.3, 6.0, []),
        (COARSE, 6.5, 6.0, ["logits differ"]),
        (COARSE, 4.9, 5.2, []),  # a near tie: either token is right
        (COARSE, 4.9, 6.0, ["logits differ", "1 of 1 tokens differ"]),
        (EXACT, float("nan"), 6.0, ["logits differ"]),
        (COARSE, float("inf"), 6.0, ["logits differ"]),
    ],
)
def test_what_is_beyond_its_bound_is_told(limits, ours, reference, complaints):
    agreement = Agreement()
    agreement.add(_rows(ours), _rows(reference))
    found = agreement.complaints(limits, None)
    assert len(found) >= len(complaints) and bool(found) == bool(complaints)
    assert all(wanted in text for wanted, text in zip(complaints, found, strict=False))


def test_noise_is_between_any_two_runs_and_finite_or_nothing_is_right():
    runs = [_rows(6.0, 4.0), _rows(6.2, 4.0), _rows(5.7, 4.1)]
    assert noise_of(runs) == pytest.approx(0.5)
    assert noise_of([*runs, _rows(float("nan"), 4.0)]) == float("inf")
    broken = Limits(dtype=torch.bfloat16, scale=10.0, noise=float("inf"))
    agreement = Agreement()
    agreement.add(_rows(6.0), _rows(6.0))
    assert agreement.complaints(broken, None)


def test_kv_is_bitwise_and_hidden_is_not():
    def complaints(difference: float, limits: Limits, kind: ChunkKind) -> int:
        agreement = Agreement()
        agreement.add_kv(difference)
        return len(agreement.complaints(limits, kind))

    assert complaints(0.0, EXACT, ChunkKind.KV) == 0
    assert complaints(1e-9, EXACT, ChunkKind.KV) == complaints(1e-9, COARSE, ChunkKind.KV) == 1
    assert complaints(1e-6, EXACT, ChunkKind.HIDDEN) == 0
    assert complaints(1e-3, EXACT, ChunkKind.HIDDEN) == 1
    assert complaints(0.03, COARSE, ChunkKind.HIDDEN) == 0
    assert complaints(0.3, COARSE, ChunkKind.HIDDEN) == complaints(float("inf"), COARSE, ChunkKind.HIDDEN) == 1


def test_relative_difference():
    ours = torch.tensor([1.0, 2.0, -4.0])
    assert relative_difference(ours, ours.clone()) == 0.0
    assert relative_difference(ours + torch.tensor([0.0, 1.0, 0.0]), ours) == 0.25
    assert relative_difference(torch.zeros(3), torch.zeros(3)) == 0.0
    nan = torch.full((3,), float("nan"))
    assert relative_difference(nan, ours) == relative_difference(ours, nan) == relative_difference(nan, nan)
    assert relative_difference(nan, nan) == relative_difference(ours, torch.zeros(3)) == float("inf")


def _budget(seconds: float = 100.0, **changes: float) -> Budget:
    settings = {"num_turns": 3, "num_kinds": 2, "num_splits": 0, "max_context_tokens": 4096}
    return Budget(seconds=seconds, **{**settings, "token_s": 1e-3, "step_s": 1e-3, **changes})


@pytest.mark.parametrize(("seconds", "num_repeats"), [(60.0, 3), (1000.0, 7)])
def test_with_time_every_history_is_timed_three_times_and_more(seconds, num_repeats):
    budget, done = _budget(seconds), []
    for wanted in (512, 2048):
        planned, told = budget.choose(wanted, done)
        assert (planned, told) == (Round(history_tokens=wanted, num_repeats=num_repeats), None)
        done.append(wanted)


def test_a_history_is_shortened_to_the_context_and_to_the_time():
    planned, told = _budget().choose(100_000, [])
    assert planned.history_tokens == 4096 - 1 - 32 - 16 and "the model's context holds 4047" in told
    planned, told = _budget(5.0).choose(2048, [])
    assert planned.history_tokens in (256, 512) and f"shortened to {planned.history_tokens}" in told


def test_something_is_always_checked_but_nothing_twice():
    budget = _budget(0.0)
    planned, told = budget.choose(512, [])
    assert planned == Round(history_tokens=64, num_repeats=1) and "timed once" in told
    planned, told = budget.choose(2048, [64])
    assert planned is None and "skipped" in told
    assert _budget().choose(512, [512])[0] is None
    planned, told = _budget(5.0).choose(2048, [512])
    assert planned is None and "skipped" in told, "shorter than what was done already"


def test_what_a_round_took_is_what_the_next_one_is_judged_by():
    budget = _budget()
    done = Round(history_tokens=512, num_repeats=3)
    planned, _ = budget.choose(2048, [512])
    assert planned == Round(history_tokens=2048, num_repeats=3)
    before_s = budget.cost_s(done)
    budget.learn(done, 10 * before_s)
    assert budget.cost_s(done) == pytest.approx(10 * before_s)
    assert budget.choose(2048, [512])[0] is None
