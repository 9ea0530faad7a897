"""What a step may wait is a share of what such a step takes, and never of more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.runtime.pace import FIRST_STEP_S, NEWEST_SHARE, Pace

sizes = st.integers(2, 768)


def test_a_first_guess_scales_with_the_tokens():
    assert Pace(100).expected_s(100) == FIRST_STEP_S
    assert Pace(100).expected_s(10) == pytest.approx(FIRST_STEP_S / 10)


@pytest.mark.parametrize("step_s", [0.01, 4.0])
def test_equal_steps_are_learnt(step_s):
    pace = Pace(768)
    for _ in range(40):
        pace.note(100, step_s)
    assert pace.expected_s(100) == pytest.approx(step_s, rel=0.01)
    assert pace.expected_s(50) == pytest.approx(step_s / 2, rel=0.01)


@given(
    step_cost_s=st.floats(0, 0.1),
    token_cost_s=st.floats(1e-6, 1e-3),
    measured=st.lists(sizes, max_size=30),
    num_tokens=sizes,
)
def test_no_mix_of_steps_makes_one_look_longer_than_it_is(step_cost_s, token_cost_s, measured, num_tokens):
    """Two tokens cost nearly what 768 do: by tokens alone a full step would be thought to take 384 times as long."""
    pace = Pace(768)
    for size in measured:
        pace.note(size, step_cost_s + token_cost_s * size)
    still_guessed_s = FIRST_STEP_S * (1 - NEWEST_SHARE) ** len(measured)
    assert pace.expected_s(num_tokens) <= step_cost_s + token_cost_s * num_tokens + still_guessed_s + 1e-9
