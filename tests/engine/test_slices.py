"""How long a restore may hold up running sequences at a time."""

from __future__ import annotations

import pytest

from mii_hcache.engine.admission import SLICE_SHARE
from tests.engine_kit import open_client, poisoned_engine


@pytest.mark.parametrize(("step_s", "slice_s"), [(0.001, 0.010), (0.100, 0.100 * SLICE_SHARE)])
def test_a_slice_is_what_was_asked_for_or_half_a_step(tiny_model, step_s, slice_s):
    client = open_client(poisoned_engine(tiny_model("llama")), restore_slice_s=0.010)
    try:
        admission = client.service._scheduler._admission
        admission._others_s = step_s
        assert admission._slice_s == pytest.approx(slice_s)
        admission._running[1] = None  # somebody runs
        share = slice_s / (slice_s + step_s)
        assert admission._compute_share() == pytest.approx(share, rel=0.42), "to a power of two"
        admission._running.clear()
        assert admission._compute_share() == 1.0
    finally:
        client.service.close()
