"""On which device a span is put: in turn, each writer's on devices of its own, and all devices get as much."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.storage.directions import Writer
from mii_hcache.storage.turns import Turns, cycle_of
from tests.storage.storage_kit import make_record

NOWHERE = lambda span_id: None  # noqa: E731


def writers_of(num_writers: int) -> list[Writer]:
    return [Writer(idx=idx, num_writers=num_writers) for idx in range(num_writers)]


def contexts(num_writers: int, num_paths: int, lengths) -> Counter[tuple[int, int]]:
    """How many spans of each writer lie on each path."""
    turns, found = Turns(num_paths), Counter()
    for name, num_spans in enumerate(lengths):
        for idx in range(num_spans):
            parent = f"{name}/{idx - 1}" if idx else None
            record = make_record(f"{name}/{idx}", parent=parent, span_idx=idx)
            writer = Writer(idx=idx % num_writers, num_writers=num_writers)
            order = turns.of(record, writer, NOWHERE)
            assert sorted(order) == list(range(num_paths)), "handed on to every other path"
            turns.take(record, order[0])
            found[writer.idx, order[0]] += 1
    return found


@given(num_writers=st.integers(1, 16), num_paths=st.integers(1, 24))
def test_all_paths_get_as_much_of_as_few_writers_as_can_be(num_writers, num_paths):
    cycles = [cycle_of(writer, num_paths) for writer in writers_of(num_writers)]
    got = Counter(path for cycle in cycles for path in cycle)
    assert len({len(cycle) for cycle in cycles}) == 1
    assert set(got) == set(range(num_paths)) and len(set(got.values())) == 1
    if num_paths % num_writers == 0:
        assert cycles == [tuple(range(idx, num_paths, num_writers)) for idx in range(num_writers)]
    # shares that are laid side by side meet so often; no way of sharing equally meets less
    num_pairs = sum(len(set(cycle)) for cycle in cycles)
    assert num_pairs == num_writers + num_paths - math.gcd(num_writers, num_paths)


@pytest.mark.parametrize(
    ("num_writers", "num_paths", "expected"),
    [
        (2, 2, {0: {0}, 1: {1}}),
        (2, 6, {0: {0, 2, 4}, 1: {1, 3, 5}}),
        (2, 3, {0: {0, 2}, 1: {1, 2}}),
        (4, 6, {0: {0, 4}, 1: {1, 4}, 2: {2, 5}, 3: {3, 5}}),
        (4, 2, {0: {0}, 1: {0}, 2: {1}, 3: {1}}),
        (4, 1, {0: {0}, 1: {0}, 2: {0}, 3: {0}}),
    ],
)
def test_each_writer_has_paths_of_its_own(num_writers, num_paths, expected):
    lengths = random.Random(f"{num_writers} {num_paths}").choices(range(12, 90), k=60)
    found = contexts(num_writers, num_paths, lengths)
    assert {idx: {path for one, path in found if one == idx} for idx in range(num_writers)} == expected
    by_path = Counter()
    for (_, path), num_spans in found.items():
        by_path[path] += num_spans
    assert max(by_path.values()) <= 1.12 * sum(by_path.values()) / num_paths, by_path


def test_a_context_is_spread_evenly_and_short_ones_are_too():
    found = contexts(2, 6, [60])
    assert set(found.values()) == {10}
    found = contexts(2, 6, [1] * 300)
    assert {path for _, path in found} == {0, 2, 4} and min(found.values()) > 70


def test_a_context_goes_on_where_it_was_also_after_it_was_handed_on():
    turns = Turns(4)
    chosen = []
    for idx in range(12):
        record = make_record(idx, parent=idx - 1 if idx else None, span_idx=idx)
        order = turns.of(record, Writer(idx=idx % 2, num_writers=2), NOWHERE)
        assert {order[0], order[1]} == ({0, 2} if idx % 2 == 0 else {1, 3}), "its own first"
        turns.take(record, order[0])
        if idx == 5:  # full: the next one takes it
            turns.take(record, order[1])
        chosen.append(order[0])
    assert chosen == chosen[:4] * 3


def test_spans_of_all_writers_follow_each_other_wherever_that_was():
    turns = Turns(3)
    first, second = make_record("a"), make_record("b", parent="a", span_idx=1)
    start = turns.of(first, None, NOWHERE)
    assert start == [(start[0] + step) % 3 for step in range(3)]
    assert turns.of(second, None, lambda span_id: 1) == [2, 0, 1], "nobody remembers it, but it lies there"
    turns.take(first, 2)
    assert turns.of(second, None, lambda span_id: 1) == [0, 1, 2]
