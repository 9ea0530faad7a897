"""A span is worth saving once enough earlier prompts had it."""

from __future__ import annotations

import pytest

from mii_hcache.runtime.sightings import Sightings


@pytest.mark.parametrize("save_after", [1, 2, 5])
def test_a_span_is_saved_after_so_many_earlier_prompts(save_after):
    sightings = Sightings(save_after=save_after)
    for _ in range(save_after):
        sightings.note([b"a", b"b"])
        assert not sightings.is_worth_saving(b"a")
    sightings.note([b"a"])
    assert sightings.is_worth_saving(b"a")
    assert not sightings.is_worth_saving(b"b") and not sightings.is_worth_saving(b"never seen")


def test_without_a_threshold_everything_is_saved_and_nothing_remembered():
    sightings = Sightings(save_after=0)
    sightings.note([b"a"])
    assert sightings.is_worth_saving(b"never seen")
    assert not sightings._counts


def test_what_was_not_seen_for_longest_is_forgotten():
    sightings = Sightings(save_after=1, max_spans=3)
    sightings.note([b"a", b"b", b"c"])
    sightings.note([b"a"])
    sightings.note([b"d"])  # forgets b
    sightings.note([b"b", b"c"])
    assert len(sightings._counts) == 3
    assert [sightings.is_worth_saving(span_id) for span_id in (b"a", b"b", b"c")] == [False, False, True]
