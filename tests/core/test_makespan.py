"""Two resources that take turns: the composed form, the simulation, and what must hold of both."""

from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.core.makespan import NOTHING, Cell, Flow, makespan

seconds = st.integers(0, 50).map(float)
rows = st.lists(st.builds(Cell, seconds, seconds), max_size=12)


def flow_of(cells: list[Cell]) -> Flow:
    return reduce(Flow.then, (Flow.of(*cell) for cell in cells), NOTHING)


def test_by_hand():
    """io   [ 2 ][ 3   ][1]
    compute      [ 4     ][ 1 ][ 5 ]"""
    line = makespan([Cell(2, 4), Cell(3, 1), Cell(1, 5)])
    assert (line.io_s, line.compute_s, line.makespan_s) == (6, 10, 12)
    assert line.bubble_s == 2
    assert line.bubble_fraction == pytest.approx(1 / 6)


def test_reads_that_nobody_waits_for():
    line = makespan([Cell(3, 1), Cell(3, 1), Cell(3, 0)])
    assert (line.makespan_s, line.bubble_s) == (9, 0)


def test_recomputation_runs_while_the_first_tile_is_read():
    assert makespan([Cell(0, 5), Cell(5, 1)]).makespan_s == 6


def test_nothing_takes_no_time():
    line = makespan([])
    assert (line.io_s, line.compute_s, line.makespan_s, line.bubble_s, line.bubble_fraction) == (0, 0, 0, 0, 0)


def test_few_buffers_hold_reads_back():
    """With one buffer a read starts when the tile before it has been computed on."""
    cells = [Cell(2, 3)] * 3
    assert makespan(cells, max_ahead_cells=1).makespan_s == 15
    assert makespan(cells, max_ahead_cells=2).makespan_s == 2 + 3 * 3
    assert makespan(cells).makespan_s == 2 + 3 * 3


def test_long_work_before_the_first_tile_fills_the_buffers():
    cells = [Cell(0, 100), *[Cell(10, 1)] * 10]
    assert makespan(cells).makespan_s == 110
    assert makespan(cells, max_ahead_cells=2).makespan_s == 100 + 1 + 8 * 10 + 1


@pytest.mark.parametrize("bound", [0, -1])
def test_no_buffers_are_refused(bound):
    with pytest.raises(ValueError, match="max_ahead_cells must be >= 1"):
        makespan([], max_ahead_cells=bound)


@settings(deadline=None)
@given(rows)
def test_composed_is_simulated(cells):
    assert flow_of(cells).timeline == makespan(cells)


@settings(deadline=None)
@given(rows, st.integers(0, 9))
def test_repeated_is_written_out(cells, count):
    assert flow_of(cells).times(count) == flow_of(cells * count)


@settings(deadline=None)
@given(rows, rows, rows)
def test_composing_is_associative(one, two, three):
    a, b, c = flow_of(one), flow_of(two), flow_of(three)
    assert a.then(b).then(c) == a.then(b.then(c))
    assert NOTHING.then(a) == a == a.then(NOTHING)


@settings(deadline=None)
@given(rows, st.none() | st.integers(1, 5))
def test_no_faster_than_either_resource_and_no_slower_than_both_in_turn(cells, bound):
    line = makespan(cells, max_ahead_cells=bound)
    assert max(line.io_s, line.compute_s) <= line.makespan_s <= line.io_s + line.compute_s
    assert line.bubble_s == line.makespan_s - max(line.io_s, line.compute_s)
    assert 0 <= line.bubble_fraction <= 0.5 + 1e-9


@settings(deadline=None)
@given(rows, st.none() | st.integers(1, 5), st.floats(1, 3), st.floats(1, 3))
def test_slower_resources_take_no_less(cells, bound, io, compute):
    slower = [Cell(io * cell.io_s, compute * cell.compute_s) for cell in cells]
    assert (
        makespan(slower, max_ahead_cells=bound).makespan_s
        >= makespan(cells, max_ahead_cells=bound).makespan_s * (1 - 1e-9)
    )  # fmt: skip


@settings(deadline=None)
@given(rows, st.integers(1, 5))
def test_more_buffers_take_no_longer(cells, bound):
    times = [makespan(cells, max_ahead_cells=ahead).makespan_s for ahead in (bound, bound + 1, None)]
    assert times == sorted(times, reverse=True)
