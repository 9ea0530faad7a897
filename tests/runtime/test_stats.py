"""Counters lose nothing, whoever counts."""

from __future__ import annotations

import sys
import threading

from mii_hcache.runtime.stats import Counters


def test_counters_grow_and_gauges_are_set():
    counters = Counters()
    assert counters.get("steps_total") == 0
    counters.add("steps_total")
    counters.add("wait_seconds_total", 0.5)
    counters.set("spans", 7)
    counters.set("spans", 3)
    assert counters.snapshot() == {"steps_total": 1, "wait_seconds_total": 0.5, "spans": 3}


def test_asking_does_not_make_a_counter():
    counters = Counters()
    counters.get("steps_total")
    assert counters.snapshot() == {}


def test_a_snapshot_is_a_copy():
    counters = Counters()
    counters.add("steps_total")
    counters.snapshot()["steps_total"] = 9
    assert counters.get("steps_total") == 1


def test_threads_that_count_at_the_same_time_lose_nothing():
    counters = Counters()
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: [counters.add("steps_total") for _ in range(5000)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert counters.get("steps_total") == 20000
