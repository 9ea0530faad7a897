"""Rows are copied when they are there, and room that was taken is kept or given back, never both."""

from __future__ import annotations

import pytest
import torch

from mii_hcache.runtime.capture import HostCapture, make_capture
from mii_hcache.runtime.streams import HostStream
from tests.runtime.kit import PoisonedRing

ROWS = 8


@pytest.fixture
def capture() -> HostCapture:
    ring = PoisonedRing(num_layers=2, capacity_rows=ROWS, row_elements=3, dtype=torch.float32)
    capture = make_capture(ring, stage=None, main=HostStream())
    assert isinstance(capture, HostCapture)
    return capture


def test_rows_are_copied_before_the_buffer_is_used_again(capture):
    reused = torch.empty(5, 3)
    assert capture.begin(5, 0.0)
    for saved_idx in range(2):
        reused.fill_(saved_idx)
        capture.take(saved_idx, reused)
    reused.fill_(float("nan"))
    lease, ready = capture.end()
    assert lease is not None and ready is None
    assert lease.num_rows == 5 and [lease.rows[idx].unique().tolist() for idx in range(2)] == [[0.0], [1.0]]
    assert capture.ring.leased_rows == 5, "the rows belong to who asked for them"
    capture.ring.release(lease)


def test_a_step_without_room_is_dropped_whole(capture):
    assert capture.begin(ROWS, 0.0)
    first, _ = capture.end()
    assert first is not None
    first.rows.fill_(1)
    assert not capture.begin(1, 0.0)
    assert capture.rows_for(0, 1) is None
    capture.take(0, torch.zeros(1, 3))
    assert capture.end() == (None, None)
    assert (first.rows == 1).all()
    assert capture.ring.leased_rows == ROWS


def test_an_aborted_step_gives_its_room_back_once(capture):
    assert capture.begin(ROWS, 0.0)
    capture.abort()
    assert capture.ring.leased_rows == 0
    capture.abort()
    assert capture.end() == (None, None)
    assert capture.begin(ROWS, 0.0)
    lease, _ = capture.end()
    capture.abort()  # what was handed over is not ours any more
    assert lease is not None and capture.ring.leased_rows == ROWS


@pytest.fixture
def wide() -> HostCapture:
    """Rows that a kernel likes to write."""
    return make_capture(
        PoisonedRing(num_layers=2, capacity_rows=ROWS, row_elements=4, dtype=torch.float32),
        stage=None,
        main=HostStream(),
    )


def test_rows_that_are_written_in_their_place_are_not_copied(wide, monkeypatch):
    assert wide.begin(5, 0.0)
    monkeypatch.setattr(wide, "_copy", lambda rows, hidden: pytest.fail("a copy"))
    for saved_idx in range(2):
        rows = wide.rows_for(saved_idx, 5)
        assert rows.shape == (5, 4) and rows.is_contiguous()
        rows.fill_(saved_idx)
        wide.take(saved_idx, rows)
    lease, _ = wide.end()
    assert [lease.rows[idx].unique().tolist() for idx in range(2)] == [[0.0], [1.0]]
    wide.ring.release(lease)


def test_only_the_running_step_has_rows(wide):
    """A forward that comes between steps, or beside one, must not write over what was saved."""
    assert wide.rows_for(0, 5) is None
    assert wide.begin(5, 0.0)
    assert wide.rows_for(0, 5) is not None and wide.rows_for(0, 4) is None
    lease, _ = wide.end()
    assert wide.rows_for(0, 5) is None
    wide.ring.release(lease)
    assert wide.begin(5, 0.0)
    wide.abort()
    assert wide.rows_for(0, 5) is None


def test_rows_that_lie_crookedly_are_for_copies_only(capture):
    assert capture.begin(5, 0.0)
    assert capture.rows_for(0, 5) is None, "12 bytes a row"
    capture.abort()
