"""Overlap and bubbles are computed right, and a trace can be opened."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.errors import ConfigError
from mii_hcache.runtime.timeline import Event, RestoreTimeline, TraceFile, union_s


def _timeline(*events: Event, started_s: float, stopped_s: float) -> RestoreTimeline:
    timeline = RestoreTimeline()
    timeline.events += events
    timeline.started_s, timeline.stopped_s = started_s, stopped_s
    return timeline


def test_busy_times_and_bubble():
    timeline = _timeline(
        Event("read", 10.0, 11.0),
        Event("read", 10.5, 12.0),
        Event("wait", 10.0, 11.0),
        Event("project", 11.0, 11.5),
        Event("fill", 12.0, 12.25, num_layers=3),
        Event("place", 13.0, 13.5),
        started_s=10.0,
        stopped_s=14.0,
    )
    assert timeline.io_s == 2.0
    assert timeline.compute_s == 1.25
    assert timeline.makespan_s == 4.0
    assert timeline.bubble_s == 2.0
    assert timeline.busy_s("read", "wait", "project", "place", "fill") == 2.75


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=12))
def test_union_counts_every_moment_once(pieces):
    covered = {moment for start, length in pieces for moment in range(start, start + length)}
    assert union_s((start, start + length) for start, length in pieces) == len(covered)


def test_a_trace_can_be_opened_after_every_write(tmp_path):
    trace = TraceFile(tmp_path / "trace.json")
    for number in range(3):
        timeline = _timeline(
            Event("read", 1.0, 2.0, first_layer=2, start=64, num_tokens=64, num_bytes=5),
            Event("read", 1.5, 2.5),
            Event("fill", 1.0, 1.5, num_layers=4, num_tokens=64),
            started_s=1.0,
            stopped_s=3.0,
        )
        trace.write(f"request {number}", timeline, {"tokens": 128})
        text = (tmp_path / "trace.json").read_text()
        entries = json.loads(text)
        assert {entry["pid"] for entry in entries} == set(range(1, number + 2))
    named = {(entry["pid"], entry["tid"]): entry["args"]["name"] for entry in entries if entry["name"] == "thread_name"}
    assert named[1, 2] != named[1, 3], "reads at the same time share a row"
    (fill,) = [entry for entry in entries if entry["pid"] == 1 and entry["name"] == "fill layers 0-3"]
    assert fill["dur"] == pytest.approx(5e5)


def test_a_trace_that_cannot_be_written_says_so_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.*choose another file"):
        TraceFile(tmp_path / "nowhere" / "trace.json")


def test_a_trace_that_can_no_longer_be_written_ends_and_nothing_else_does(tmp_path, caplog):
    trace = TraceFile(tmp_path / "trace.json")
    (tmp_path / "trace.json").unlink()
    for _ in range(2):
        trace.write("request", _timeline(started_s=0.0, stopped_s=1.0), {})
    assert len([record for record in caplog.records if "it ends here" in record.message]) == 1
