"""How far a prompt's saved prefix reaches, and why no farther."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import pack_tokens, spans_of
from mii_hcache.core.layout import SpanLayout
from mii_hcache.runtime.lookup import given_up, look_up
from tests.runtime.kit import SEED, FakeStore, geometry_of, path, span_record

GEOMETRY = geometry_of()
NUM_SPANS = 5
TOKENS = path(1, 0, NUM_SPANS * SPAN_TOKENS + 30)
SPANS = list(spans_of(SEED, TOKENS))
RECORDS = [
    span_record(TOKENS[: (idx + 1) * SPAN_TOKENS], (ChunkKind.HIDDEN, ChunkKind.KV)[idx % 2], GEOMETRY)
    for idx in range(NUM_SPANS)
]


def _store_of(span_idxs: set[int]) -> FakeStore:
    store = FakeStore()
    store.spans = {RECORDS[idx].span_id: (RECORDS[idx], []) for idx in span_idxs}
    return store


@given(present=st.sets(st.integers(0, NUM_SPANS - 1)), max_tokens=st.integers(0, len(TOKENS) + SPAN_TOKENS))
def test_the_prefix_ends_at_the_first_span_that_is_not_there(present, max_tokens):
    allowed = min(max_tokens // SPAN_TOKENS, NUM_SPANS)
    first_gap = next(idx for idx in range(NUM_SPANS + 1) if idx not in present)
    lookup = look_up(_store_of(present), SPANS, max_tokens=max_tokens)
    assert lookup.records == RECORDS[: min(first_gap, allowed)]
    assert lookup.num_tokens == SPAN_TOKENS * len(lookup.records) <= max_tokens
    if first_gap < allowed:
        assert (lookup.next_span, lookup.why_missing) == (SPANS[first_gap][0], "not_saved")
    else:
        assert (lookup.next_span, lookup.why_missing) == (None, None)


@given(present=st.sets(st.integers(0, NUM_SPANS - 1)), max_tokens=st.integers(0, len(TOKENS) + SPAN_TOKENS))
def test_where_gaps_can_be_filled_it_ends_at_the_last_span_that_is_there(present, max_tokens):
    allowed = min(max_tokens // SPAN_TOKENS, NUM_SPANS)
    stop = max((idx + 1 for idx in present if idx < allowed), default=0)
    lookup = look_up(_store_of(present), SPANS, max_tokens=max_tokens, fill_layers=GEOMETRY.num_layers)
    assert [record.span_id for record in lookup.records] == [span_id for span_id, _ in SPANS[:stop]]
    for idx, record in enumerate(lookup.records):
        if idx in present:
            assert record == RECORDS[idx]
        else:
            assert record == dataclasses.replace(RECORDS[idx], layout=SpanLayout.nothing(GEOMETRY.num_layers))
    assert lookup.num_tokens == stop * SPAN_TOKENS <= max_tokens
    assert lookup.unbroken().records == look_up(_store_of(present), SPANS, max_tokens=max_tokens).records
    first_gap = next(idx for idx in range(NUM_SPANS + 1) if idx not in present)
    assert lookup.next_span == (SPANS[first_gap][0] if first_gap < allowed else None)


def test_nothing_behind_other_tokens_is_this_prompts():
    store = _store_of(set(range(NUM_SPANS)))
    store.spans[SPANS[2][0]] = dataclasses.replace(RECORDS[2], span_idx=1), []
    lookup = look_up(store, SPANS, max_tokens=len(TOKENS), fill_layers=GEOMETRY.num_layers)
    assert lookup.records == RECORDS[:2] and lookup.why_missing == "mismatch"


def test_the_store_says_why():
    store = _store_of({0, 2})
    store.why = {SPANS[1][0]: "evicted"}
    assert look_up(store, SPANS, max_tokens=len(TOKENS)).why_missing == "evicted"


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": pack_tokens([*TOKENS[2 * SPAN_TOKENS : 3 * SPAN_TOKENS - 1], 9])},
        {"span_idx": 1},
    ],
    ids=["other tokens", "another position"],
)
def test_a_span_of_other_tokens_under_the_same_id_ends_the_prefix(change):
    store = _store_of(set(range(NUM_SPANS)))
    store.spans[SPANS[2][0]] = dataclasses.replace(RECORDS[2], **change), []
    lookup = look_up(store, SPANS, max_tokens=len(TOKENS))
    assert lookup.records == RECORDS[:2]
    assert (lookup.next_span, lookup.why_missing) == (SPANS[2][0], "mismatch")


def test_nothing_asked_for_is_nothing_missing():
    lookup = look_up(_store_of(set()), [], max_tokens=0)
    assert (lookup.records, lookup.next_span, lookup.why_missing, lookup.num_tokens) == ([], None, None, 0)


@pytest.mark.parametrize(("why", "is_given_up"), [("evicted", True), ("not_saved", False), ("unavailable", False)])
def test_only_what_the_store_evicted_is_not_saved_again(why, is_given_up):
    """Else a disk that was missing at the start would leave its holes for good."""
    store = _store_of({0, 2})
    store.why = {SPANS[1][0]: why}
    lookup = look_up(store, SPANS, max_tokens=len(TOKENS), fill_layers=2)
    assert given_up(store, lookup.records) == ({SPANS[1][0]} if is_given_up else frozenset())
