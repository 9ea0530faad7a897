"""Whatever a busy machine's clock says, a profile comes out that can be planned with."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.runtime.profiler import TILE_TOKENS, _Computing, _together
from mii_hcache.runtime.stopwatch import Stopwatch
from tests.runtime.kit import FakeBlocks, FakeEngine, geometry_of


@settings(deadline=None, max_examples=150)
@given(st.lists(st.floats(1e-7, 10.0), min_size=12, max_size=12))
def test_noise_makes_no_negative_costs(times_s):
    engine = FakeEngine(geometry_of())
    computing = _Computing(engine, FakeBlocks(engine), TILE_TOKENS, repeats=1)
    clock = iter(times_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stopwatch, "least_s", lambda self, action, pauses=True: next(clock))
        cost = computing.measure()  # LayerCost itself refuses what is negative or infinite
    assert cost.c_token_s > 0 and cost.c_hidden_s > 0


def test_an_engine_that_fails_while_others_read_leaves_nobody_reading():
    is_reading = threading.Event()

    def fail() -> None:
        assert is_reading.wait(60)
        raise RuntimeError("the engine failed")

    def read(kind, is_wanted) -> int:
        is_reading.set()
        return 1

    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="the engine failed"):
        _together(SimpleNamespace(project=fail), SimpleNamespace(read=read), 0.0)
    assert not set(threading.enumerate()) - before
