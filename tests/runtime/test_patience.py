"""What a step may wait is a share of what the device takes for one, known without waiting for the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mii_hcache.runtime import streams
from mii_hcache.runtime.patience import Patience
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Event, HostStream

MAX_BATCH = 100


class Moment(Event):
    is_done = False
    passed_s = float("nan")

    def synchronize(self) -> None:
        raise AssertionError("a step must not wait for the device")

    def pass_at(self, passed_s: float) -> None:
        self.is_done, self.passed_s = True, passed_s


class Slow(HostStream):
    """Its work is done when the test says so."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []

    def record(self, *, is_timed: bool = False) -> Event:
        assert is_timed
        self.moments.append(Moment())
        return self.moments[-1]


def _patience(main: HostStream) -> Patience:
    return Patience(share=0.5, max_batch_tokens=MAX_BATCH, counters=Counters(), main=main)


def _step(patience: Patience, num_tokens: int, *, is_prefill: bool = True) -> None:
    patience.begin(num_tokens, is_prefill=is_prefill)
    patience.start_clock(is_prefill=is_prefill)
    patience.end(num_tokens)


def test_a_step_takes_as_long_as_its_device_says():
    main = Slow()
    patience = _patience(main)
    guess_s = patience.pace.expected_s(MAX_BATCH)
    _step(patience, MAX_BATCH)
    _step(patience, MAX_BATCH)
    assert patience.pace.expected_s(MAX_BATCH) == guess_s, "nothing is known while the device computes"
    for idx, passed_s in enumerate((7.0, 9.0, 9.0)):  # the first is done, the second has begun
        main.moments[idx].pass_at(passed_s)
    _step(patience, 1, is_prefill=False)
    assert patience.pace.expected_s(MAX_BATCH) == pytest.approx(0.7 * guess_s + 0.3 * 2.0)
    main.moments[3].pass_at(13.0)
    patience.begin(MAX_BATCH, is_prefill=True)
    expected_s = 0.7 * (0.7 * guess_s + 0.3 * 2.0) + 0.3 * 4.0
    assert patience.pace.expected_s(MAX_BATCH) == pytest.approx(expected_s)
    assert patience.wait_for(lambda wait_s: wait_s) == pytest.approx(0.5 * expected_s)


def test_decode_steps_are_not_even_timed():
    main = Slow()
    for _ in range(3):
        _step(_patience(main), 4, is_prefill=False)
    assert not main.moments


def test_a_step_that_failed_is_not_learnt():
    main = Slow()
    patience = _patience(main)
    patience.begin(MAX_BATCH, is_prefill=True)
    patience.start_clock(is_prefill=True)  # and then it was aborted
    _step(patience, 1, is_prefill=False)
    assert len(main.moments) == 1 and not patience._launched


def test_on_a_cpu_a_step_is_known_when_it_returns(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(streams, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    patience = _patience(HostStream())
    for _ in range(60):
        patience.begin(MAX_BATCH, is_prefill=True)
        patience.start_clock(is_prefill=True)
        clock[0] += 0.002
        patience.end(MAX_BATCH)
    assert patience.pace.expected_s(MAX_BATCH) == pytest.approx(0.002, rel=1e-3)
