"""What is shown while a model is loaded."""

import io
import re
import time

import pytest

from mii_hcache.serve.loading import Loading


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _shown(stream):
    """Lines of a terminal: what `\\r` and the erasing of a line leave."""
    return [line.split("\r\033[K")[-1] for line in stream.getvalue().split("\n")]


def test_on_a_terminal_a_bar_moves():
    stream = _Terminal()
    with Loading(stream) as loading:
        loading.phase("reading weights")
        loading.phase("hashing", 1, 4)
        deadline = time.monotonic() + 60
        while "25%" not in stream.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        loading.phase("hashing", 3, 4)
        while "75%" not in stream.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "[#######.......................] 25%" in stream.getvalue()
    first, second, rest = _shown(stream)
    assert re.fullmatch(r" +\d+\.\d s  reading weights", first)
    assert re.fullmatch(r" +\d+\.\d s  hashing", second)  # without its bar, which says nothing any more
    assert rest == ""


def test_a_library_that_draws_bars_of_its_own_is_not_drawn_over(monkeypatch):
    stream = _Terminal()
    monkeypatch.setattr("mii_hcache.serve.loading._TICK_S", 0.001)
    with Loading(stream) as loading:
        loading.phase("fetching weights")
        drawn = stream.getvalue()
        time.sleep(0.05)
        assert stream.getvalue() == drawn and drawn.endswith("fetching weights\n")
        loading.phase("reading weights")


def test_elsewhere_a_line_for_each_phase():
    stream = io.StringIO()
    with Loading(stream) as loading:
        for idx in range(1000):
            loading.phase("hashing", idx, 1000)
        loading.phase("starting")
    assert [line.split("  ")[-1] for line in stream.getvalue().splitlines()] == ["hashing", "starting"]
    assert "\r" not in stream.getvalue()


def test_elsewhere_a_long_phase_says_now_and_then_how_far_it_is(monkeypatch):
    stream = io.StringIO()
    now = time.monotonic()
    monkeypatch.setattr("mii_hcache.serve.loading.time.monotonic", lambda: now)
    with Loading(stream) as loading:
        for idx in range(40):
            loading.phase("hashing", idx, 40)
            now += 1
    words = [line.split("  ")[-1] for line in stream.getvalue().splitlines()]
    assert words == ["hashing", "hashing: 27%", "hashing: 55%", "hashing: 82%"]


def test_a_failure_leaves_the_line_and_no_thread():
    stream = _Terminal()
    loading = Loading(stream)
    with pytest.raises(ZeroDivisionError), loading:
        loading.phase("reading weights")
        raise ZeroDivisionError
    assert stream.getvalue().endswith("reading weights\n") and not loading._ticker.is_alive()
