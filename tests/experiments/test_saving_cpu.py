"""What measures the host work of saving really saves, by either way."""

from __future__ import annotations

import pytest

from experiments.saving_cpu.step_work import LikeDevice, step_work
from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.runtime.streams import HostStreams


@pytest.mark.parametrize("is_in_place", [False, True])
@pytest.mark.parametrize("streams", [HostStreams, LikeDevice])
def test_every_span_of_the_bench_is_saved(streams, is_in_place):
    row = step_work(2, 2 * SPAN_TOKENS, is_in_place=is_in_place, streams=streams())
    assert row["num_spans"] == 2 + 1  # the second sequence begins in the middle of a span, which stays unsaved
    assert row["step_us"] == pytest.approx(row["begin_us"] + row["taps_us"] + row["end_us"], abs=0.1)
    assert min(row["begin_us"], row["taps_us"], row["end_us"]) > 0
