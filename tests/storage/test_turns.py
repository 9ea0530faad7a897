"""On which device a span is put: in turn, each writer's on devices of its own, and all devices get as much."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.storage.directions import Writer
from mii_hcache.storage.records import SpanRecord
from mii_hcache.storage.turns import cycle_of, turns_of
from tests.storage.storage_kit import make_record


def writers_of(num_writers: int) -> list[Writer]:
    return [Writer(idx=idx, num_writers=num_writers) for idx in range(num_writers)]


def context(name: object, num_spans: int) -> list[SpanRecord]:
    return [
        make_record(f"{name}/{idx}", parent=f"{name}/{idx - 1}" if idx else None, root=f"{name}/0", span_idx=idx)
        for idx in range(num_spans)
    ]


def contexts(num_writers: int, num_paths: int, lengths) -> Counter[tuple[int, int]]:
    """How many spans of each writer lie on each path."""
    found = Counter()
    for name, num_spans in enumerate(lengths):
        for record in context(name, num_spans):
            writer = Writer(idx=record.span_idx % num_writers, num_writers=num_writers)
            order = turns_of(record, num_paths, writer)
            assert sorted(order) == list(range(num_paths)), "handed on to every other path"
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


def test_a_writer_s_own_paths_come_first():
    orders = [turns_of(record, 4, Writer(idx=record.span_idx % 2, num_writers=2)) for record in context("a", 12)]
    assert [{*order[:2]} for order in orders] == [{0, 2}, {1, 3}] * 6
    chosen = [order[0] for order in orders]
    assert chosen == chosen[:4] * 3


def test_spans_of_no_writer_follow_each_other():
    chosen = [turns_of(record, 3)[0] for record in context("a", 12)]
    assert chosen == [(chosen[0] + idx) % 3 for idx in range(12)]


@pytest.mark.parametrize("writer", [None, Writer(idx=0, num_writers=1)])
def test_what_a_missing_path_hands_on_is_spread_over_the_others(writer):
    orders = [turns_of(record, 4, writer) for record in context("a", 48)]
    taken = Counter(next(idx for idx in order if idx != 2) for order in orders)
    assert taken == {0: 16, 1: 16, 3: 16}


def test_a_span_of_an_unknown_context_has_a_place_of_its_own():
    records = [make_record(idx, parent=idx - 1, span_idx=idx) for idx in range(1, 301)]
    assert min(Counter(turns_of(record, 3)[0] for record in records).values()) > 70
