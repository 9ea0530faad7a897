"""Whatever a busy machine's clock says, a profile comes out that can be planned with."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.runtime.profiler import TILE_TOKENS, _Computing
from mii_hcache.runtime.stopwatch import Stopwatch
from tests.runtime.kit import FakeBlocks, FakeEngine, geometry_of


@settings(deadline=None, max_examples=300)
@given(st.lists(st.floats(1e-7, 10.0), min_size=12, max_size=12))
def test_noise_makes_no_negative_costs(times_s):
    engine = FakeEngine(geometry_of())
    computing = _Computing(engine, FakeBlocks(engine), TILE_TOKENS, repeats=1)
    clock = iter(times_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stopwatch, "least_s", lambda self, action, pauses=True: next(clock))
        cost = computing.measure()  # LayerCost itself refuses what is negative or infinite
    assert cost.c_token_s > 0 and cost.c_hidden_s > 0
