"""The ring on the device: no byte is written while it is still being sent, and no step waits for the one before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.plans import StoragePlan, uniform_storage
from mii_hcache.runtime.saver import stage_bytes
from mii_hcache.runtime.stage import Stage
from mii_hcache.runtime.streams import Event
from tests.runtime.delayed_streams import DelayedStreams
from tests.runtime.kit import geometry_of

CPU = torch.device("cpu")
MAX_ROWS = 40
NUM_LAYERS = 5


@given(seed=st.integers(0, 1 << 30), steps=st.lists(st.tuples(st.integers(1, MAX_ROWS), st.booleans()), max_size=30))
@settings(max_examples=150, deadline=None)
def test_what_arrives_is_what_was_staged(seed, steps):
    """Rows of 100 bytes, which fit no alignment; a failed step drops its parts."""
    streams = DelayedStreams(seed)
    stage = Stage(streams=streams, device=CPU, num_bytes=100 * MAX_ROWS * (NUM_LAYERS + 1) + 512)
    sent: list[tuple[int, torch.Tensor, Event]] = []
    for stamp, (num_rows, is_failing) in enumerate(steps, start=1):
        parts = stage.take_rows(NUM_LAYERS, 100 * num_rows)
        assert sum(part.memory.numel() for part in parts) == 100 * num_rows * NUM_LAYERS
        for part in parts:
            streams.main.copy(part.memory, torch.full_like(part.memory, stamp))
        if not is_failing:
            hosts = [torch.zeros_like(part.memory) for part in parts]
            done = stage.send(list(zip(hosts, parts, strict=True)))
            sent += [(stamp, host, done) for host in hosts]
    for stamp, host, done in sent:
        done.synchronize()
        assert host.unique().tolist() == [stamp]
    streams.run_all()


class Waits:
    """Streams that only note which sends the main stream waited for."""

    def __init__(self) -> None:
        self.waited: list[Any] = []
        self.main = self

    def new(self, *, is_urgent: bool = False) -> Waits:
        return Waits()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        pass

    def record(self) -> object:
        return object()

    def wait(self, event: object) -> None:
        self.waited.append(event)


@given(steps=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_whatever_lay_there_was_sent_before_it_is_written_again(steps):
    """To the byte: every part that was sent is compared with every one that is taken later."""
    streams = Waits()
    stage = Stage(streams=streams, device=CPU, num_bytes=100 * 40 * 7 + 512)
    sent: list[tuple[int, int, object]] = []
    for num_rows, num_layers, is_failing in steps:
        parts = stage.take_rows(num_layers, 100 * num_rows)
        spans = [(part.memory.data_ptr(), part.memory.data_ptr() + part.memory.numel()) for part in parts]
        if len(spans) == 2:
            assert spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0], "a step's own parts lie over each other"
        last = max((idx for idx, (_, _, event) in enumerate(sent) if event in streams.waited), default=-1)
        for start, stop in spans:
            over = [idx for idx, (first, end, _) in enumerate(sent) if first < stop and start < end]
            assert max(over, default=-1) <= last, "overwritten while it is sent"
        if not is_failing:
            event = stage.send([(torch.empty_like(part.memory), part) for part in parts])
            sent += [(start, stop, event) for start, stop in spans]


GEOMETRY = geometry_of(num_layers=6, hidden_size=64, dtype="bfloat16")
PLANS = {
    "hidden": uniform_storage(GEOMETRY, ChunkKind.HIDDEN),
    "mixed": StoragePlan(method="test", kinds=(ChunkKind.KV, *[ChunkKind.HIDDEN] * 4, ChunkKind.KV)),
}


@given(sizes=st.lists(st.sampled_from([1, 1, 2, 30, 63, 64, 127, 128, 191, 192]), min_size=2, max_size=40))
@pytest.mark.parametrize("plan", PLANS)
@settings(max_examples=100, deadline=None)
def test_no_step_waits_for_what_the_step_before_it_sends(plan, sizes):
    max_batch = 192
    num_hidden = PLANS[plan].kinds.count(ChunkKind.HIDDEN)
    num_kv = PLANS[plan].kinds.count(ChunkKind.KV)
    hidden_bytes, kv_bytes = GEOMETRY.row_bytes(ChunkKind.HIDDEN), GEOMETRY.row_bytes(ChunkKind.KV)
    streams = Waits()
    stage = Stage(streams=streams, device=CPU, num_bytes=stage_bytes(GEOMETRY, PLANS[plan], num_hidden, max_batch))
    before: set[int] = set()
    for num_rows in sizes:
        parts = stage.take_rows(num_hidden, num_rows * hidden_bytes)
        assert not before & {id(event) for event in streams.waited}
        events = [stage.send([(torch.empty_like(part.memory), part) for part in parts])]
        for _ in range(num_rows // SPAN_TOKENS if num_kv else 0):
            part = stage.take(SPAN_TOKENS * num_kv * kv_bytes)
            events.append(stage.send([(torch.empty_like(part.memory), part)]))
        before = {id(event) for event in events}
        kept = events  # so that no id is given twice
        assert kept


def test_a_stage_that_is_too_small_says_so():
    stage = Stage(streams=DelayedStreams(0), device=CPU, num_bytes=1024)
    with pytest.raises(ValueError, match="1100 bytes wanted of a stage of 1024"):
        stage.take(1100)
    stage.take(512)
    with pytest.raises(ValueError, match="3 times 300 bytes wanted"):  # one before the end, two over it
        stage.take_rows(3, 300)
