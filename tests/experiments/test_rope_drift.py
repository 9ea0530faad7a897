"""The kernel's rotary arithmetic: rounded as the types round, truncated where the source says and nowhere else."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.common import runner
from experiments.common.rows import ROOT, read_rows
from experiments.rope_drift import tiny
from experiments.rope_drift.config import DTYPES, FLOAT32, KERNEL, MODELS, Rotary
from experiments.rope_drift.kernel import (
    fast_sine_angles,
    given_frequencies,
    kernel_angles,
    made_frequencies,
    other_head_angles,
    rotated,
    rounded,
    true_frequencies,
)
from experiments.rope_drift.run import kept, phases, score_errors
from mii_hcache.engine.modules.rope import rotary_tables, rotate

LLAMA_2, LLAMA_3 = MODELS


@given(st.floats(min_value=-6e4, max_value=6e4, width=32), st.sampled_from(DTYPES))
def test_rounding_is_that_of_the_types(value, dtype):
    # From float32, which torch rounds once; the kernel rounds float64 once, as `rounded` does.
    expected = float(torch.tensor(value, dtype=torch.float32).to(getattr(torch, dtype)))
    assert float(rounded(np.float64(value), dtype)) == expected


def test_a_tie_of_float64_is_not_rounded_twice():
    just_above = 1 + 2**-8 + 2**-40  # of bfloat16, a tie for whoever goes by float32
    assert float(rounded(np.float64(just_above), "bfloat16")) == 1 + 2**-7
    assert float(rounded(np.float64(1 + 2**-8), "bfloat16")) == 1.0


@pytest.mark.parametrize("rotary", MODELS, ids=lambda rotary: rotary.name)
def test_frequencies_are_off_by_half_a_step_of_their_type_at_most(rotary):
    true = true_frequencies(rotary.theta, rotary.head_size)
    assert np.abs(given_frequencies(rotary.theta, rotary.head_size) / true - 1).max() < 3e-7
    for dtype, bits in (("float16", 11), ("bfloat16", 8)):
        made = made_frequencies(rotary.theta, rotary.head_size, dtype)
        is_normal = true > 2**-14
        off = np.abs(made / true - 1)[is_normal]
        assert 2 ** -(bits + 2) < off.max() <= 2.0**-bits * 1.001
        assert made[0] == 1.0 and torch.equal(
            torch.from_numpy(made), torch.from_numpy(made).to(getattr(torch, dtype)).double()
        )


def test_phases_are_those_that_were_known():
    """Of another reading of the source: 0.99 rad in float16, 5.0 in bfloat16 at 4,096, for theta 1e4."""
    found = {series: np.abs(error).max() for series, error in phases(LLAMA_2, 4096).items()}
    assert found[KERNEL["float16"]] == pytest.approx(0.99, abs=0.01)
    assert found[KERNEL["bfloat16"]] == pytest.approx(5.01, abs=0.01)
    assert found[FLOAT32] < 3e-4


def test_given_frequencies_turn_as_our_modules_do():
    frequencies = given_frequencies(LLAMA_3.theta, LLAMA_3.head_size)
    x = torch.randn(5, 1, 128, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 777, 4096, 131071])
    ours = rotate(x, *rotary_tables(positions, torch.from_numpy(frequencies).float()))
    angle = kernel_angles_given(frequencies, positions.numpy())
    theirs = rotated(x[:, 0].double().numpy(), angle)
    assert np.allclose(ours[:, 0].numpy(), theirs, atol=2e-6)


def kernel_angles_given(frequencies, positions):
    return np.multiply.outer(positions.astype(np.float32), frequencies.astype(np.float32)).astype(np.float64)


def test_heads_that_share_the_truncation_see_distances_others_see_positions():
    found = kept(LLAMA_3, 32768, "bfloat16")
    assert found["heads that share it, neighbours"] > 0.9999
    assert found["heads that share it, over such a distance"] < 0.9
    assert found["other heads, neighbours"] < 0.9
    errors = score_errors(LLAMA_3, 32768, "bfloat16")
    assert min(errors.values()) > 0.3
    true = 4096 * true_frequencies(LLAMA_3.theta, 128)
    assert np.abs(other_head_angles(LLAMA_3.theta, 128, 4096) - true).max() < 3e-4
    assert np.abs(kernel_angles(LLAMA_3.theta, 128, "bfloat16", 4096) - true).max() > 1


def test_the_fast_sine_rounds_turns():
    angle = np.array([0.5, 4096.0, 131071.0])
    assert np.abs(fast_sine_angles(angle) - angle).max() < 0.01
    assert np.abs(fast_sine_angles(angle) - angle)[2] > 1e-4


def test_the_tiny_model_turns_as_transformers_does_and_drifts_as_the_kernel():
    rotary = Rotary(name="test", theta=5e5, query_group=2)
    model = tiny.tiny_model(rotary)
    token_ids = torch.randint(3, tiny.VOCAB, (300,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = model(token_ids[None], logits_to_keep=tiny.LAST, use_cache=False).logits[0]
    ours = tiny.last_logits(model, rotary, token_ids, None)
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) < 2e-3 * scale
    off = {dtype: float((tiny.last_logits(model, rotary, token_ids, dtype) - ours).abs().max()) for dtype in DTYPES}
    assert 2e-3 * scale < off["float16"] < off["bfloat16"]


def test_agreement_counts_up_to_the_first_difference():
    rotary = Rotary(name="test", theta=1e4, query_group=1)
    model = tiny.tiny_model(rotary)
    answered = tiny.greedy(model, rotary, torch.arange(3, 40), 4)
    assert answered.numel() == 41
    made = tiny.last_logits(model, rotary, answered[:-1], "bfloat16", num_last=4).argmax(-1)
    answered[-4:] = made  # as if they had agreed; then one is changed
    assert tiny.agreement(model, rotary, answered, 4, "bfloat16") == 4
    answered[-1] = (made[-1] + 1) % tiny.VOCAB
    assert tiny.agreement(model, rotary, answered, 4, "bfloat16") == 3


def test_smoke(tmp_path):
    options = [] if find_spec("matplotlib") else ["--no-plots"]
    assert runner.main([*options, "--out", str(tmp_path), "rope_drift"]) == 0
    rows = read_rows(tmp_path / "rope_drift.jsonl")
    assert {row.how for row in rows} == {"simulated"}
    assert {row.panel for row in rows} == {*"abcdefg", "next tokens", "greedy"}
    assert all("never run on a GPU" in row.note for row in rows)
    if not options:
        assert 1000 < (tmp_path / "rope_drift.png").stat().st_size < 200_000


def test_what_is_recorded_is_what_is_computed_now():
    recorded = read_rows(Path(ROOT) / "experiments" / "rope_drift" / "results.jsonl")
    if not recorded:
        pytest.skip("nothing is recorded")
    for rotary, panel in zip(MODELS, "ab", strict=True):
        for row in (row for row in recorded if row.panel == panel and row.x == 4096):
            assert row.y == pytest.approx(float(np.abs(phases(rotary, 4096)[row.series]).max()), rel=1e-6)
