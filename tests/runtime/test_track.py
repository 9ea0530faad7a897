"""A track always names the spans of its tokens, and keeps no open span whose rows are not those of its tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.identity import spans_of
from mii_hcache.runtime.track import OpenSpan, SequenceTrack
from tests.runtime.kit import SEED, path

changes = st.one_of(
    st.tuples(st.just("extend"), st.integers(0, 3), st.integers(0, 150)),
    st.tuples(st.just("truncate"), st.integers(0, 400), st.none()),
)


def _assert_names(track: SequenceTrack, tokens: list[int]) -> None:
    spans = list(spans_of(SEED, tokens))
    assert track.token_ids == tokens
    assert track.num_spans == len(spans)
    assert track.span_ids == [span_id for span_id, _ in spans]
    assert [track.packed_tokens(idx) for idx in range(len(spans))] == [packed for _, packed in spans]
    parents = [track.parent_id(idx) for idx in range(len(spans))]
    assert parents == [None, *track.span_ids][: len(spans)]


@given(first=st.integers(0, 200), script=st.lists(changes, max_size=12))
@settings(deadline=None)
def test_names_follow_the_tokens(first, script):
    tokens = path(0, 0, first)
    track = SequenceTrack(uid=1, seed=SEED, token_ids=tokens)
    _assert_names(track, tokens)
    for verb, amount, length in script:
        if verb == "extend":
            more = path(amount, len(tokens), length)
            track.extend(more)
            tokens = tokens + more
        else:
            num_tokens = min(amount, len(tokens))
            assert track.truncate(num_tokens) is None
            tokens = tokens[:num_tokens]
        _assert_names(track, tokens)


def test_a_track_keeps_its_own_copy_of_the_tokens():
    tokens = path(0, 0, 10)
    track = SequenceTrack(uid=1, seed=SEED, token_ids=tokens)
    track.extend([1])
    assert len(tokens) == 10


@pytest.mark.parametrize(
    ("num_tokens", "is_kept"),
    [
        (0, False),
        (SPAN_TOKENS, False),
        (2 * SPAN_TOKENS - 1, False),
        (2 * SPAN_TOKENS, False),  # none of its rows is before the cut
        (2 * SPAN_TOKENS + 1, True),
        (2 * SPAN_TOKENS + 20, True),
    ],
)
def test_an_open_span_stays_only_when_rows_before_the_cut_are_in_it(num_tokens, is_kept):
    track = SequenceTrack(uid=1, seed=SEED, token_ids=path(0, 0, 2 * SPAN_TOKENS + 20))
    span = track.open_span = OpenSpan(span_idx=2, rows=torch.empty(0))
    assert track.truncate(num_tokens) is (None if is_kept else span)
    assert track.open_span is (span if is_kept else None)


def test_an_open_span_is_closed_once():
    track = SequenceTrack(uid=1, seed=SEED, token_ids=path(0, 0, 20))
    span = track.open_span = OpenSpan(span_idx=0, rows=torch.empty(0))
    assert track.close_open_span() is span
    assert track.close_open_span() is None
