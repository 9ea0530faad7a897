"""Chunks of a span: which layers, in which order, how long, where."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.core.geometry import ChunkKind, ModelGeometry
from mii_hcache.core.layout import SpanLayout

HIDDEN, KV = ChunkKind.HIDDEN, ChunkKind.KV
GEOMETRY = ModelGeometry(num_layers=40, hidden_size=5120, num_heads=40, num_kv_heads=40, head_size=128, dtype="float16")

some_kinds = st.lists(st.sampled_from([None, *ChunkKind]), min_size=1, max_size=50).map(tuple)
layouts = st.builds(
    lambda kinds, hidden_bytes, kv_bytes, shards: SpanLayout.shared(
        kinds, hidden_bytes, kv_bytes, shards if KV in kinds else 1
    ),
    some_kinds.filter(any),
    st.integers(1, 99),
    st.integers(1, 99),
    st.sampled_from([1, 2, 4]),
)


@given(layout=layouts)
def test_chunks_are_the_stored_layers_in_order_and_tile_the_span(layout):
    assert [(chunk.layer_idx, chunk.shard) for chunk in layout.chunks] == [
        (layer_idx, shard)
        for layer_idx, kind in enumerate(layout.kinds)
        for shard in range({None: 0, HIDDEN: 1, KV: layout.kv_shards}[kind])
    ]
    stop = 0
    for chunk_idx, chunk in enumerate(layout.chunks):
        assert chunk.kind is layout.kinds[chunk.layer_idx]
        assert chunk.num_bytes == layout.bytes_of(chunk.kind)
        assert chunk.offset == stop
        assert layout.chunk_of(chunk.layer_idx, chunk.shard) == chunk_idx
        stop += chunk.num_bytes
    assert layout.num_bytes == stop
    assert layout.num_chunks == len(layout.chunks) > 0
    joined = memoryview(bytes(index % 251 for index in range(stop)))
    assert b"".join(chunk.cut(joined) for chunk in layout.chunks) == joined


@given(layout=layouts)
def test_layers_without_a_chunk_have_none(layout):
    for layer_idx in (-1, layout.num_layers, *(i for i, kind in enumerate(layout.kinds) if kind is None)):
        assert layout.chunk_of(layer_idx) is None


@given(layout=layouts)
def test_from_the_first_stored_layer_on_all_are(layout):
    first = layout.first_stored
    assert all(kind is not None for kind in layout.kinds[first:])
    assert first == 0 or layout.kinds[first - 1] is None


@given(layout=layouts)
def test_counts_of_kinds_add_up(layout):
    assert sum(num * layout.shards_of(kind) for kind, num in layout.kind_counts.items()) == layout.num_chunks
    assert sum(layout.kind_counts.values()) == len(layout.kinds) - layout.kinds.count(None)
    assert layout.num_bytes == sum(
        num * layout.shards_of(kind) * layout.bytes_of(kind) for kind, num in layout.kind_counts.items()
    )
    assert layout.kind_names in (("hidden",), ("kv",), ("hidden", "kv"))
    assert set(layout.kind_names) == {kind.value for kind in layout.kinds if kind is not None}


@given(kinds=some_kinds, sizes=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_only_layouts_that_can_be_are_made(kinds, sizes):
    stores_nothing = not any(kinds) and sizes == (0, 0)
    can_be = stores_nothing or (
        any(kinds) and all(size > 0 or kind not in kinds for kind, size in zip((HIDDEN, KV), sizes, strict=True))
    )
    try:
        SpanLayout(kinds=kinds, hidden_chunk_bytes=sizes[0], kv_chunk_bytes=sizes[1])
    except ValueError as error:
        assert not can_be, error
    else:
        assert can_be


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="one layer at least, got 2"):
        SpanLayout.shared((None, None), 1, 1)
    assert SpanLayout.nothing(2).num_chunks == SpanLayout.nothing(2).num_bytes == 0
    assert SpanLayout.nothing(2).first_stored == 2
    with pytest.raises(ValueError, match="one layer at least, got 0"):
        SpanLayout.nothing(0)
    with pytest.raises(ValueError, match="kv_chunk_bytes must be > 0, got 0"):
        SpanLayout.shared((HIDDEN, KV), 1, 0)
    with pytest.raises(ValueError, match="39 kinds for 40 layers"):
        SpanLayout.of(GEOMETRY, [KV] * 39)


@given(layout=layouts, other=layouts)
def test_equal_layouts_are_one_object_with_one_hash(layout, other):
    again = SpanLayout.shared(layout.kinds, layout.hidden_chunk_bytes, layout.kv_chunk_bytes, layout.kv_shards)
    assert again is layout
    made = dataclasses.replace(layout)
    copied = pickle.loads(pickle.dumps(layout))
    assert layout == made == copied
    assert hash(layout) == hash(made) == hash(copied)
    assert (layout == other) == (dataclasses.astuple(layout) == dataclasses.astuple(other))


@pytest.mark.parametrize("kind", ChunkKind)
def test_uniform_layouts_store_what_the_geometry_says(kind):
    layout = SpanLayout.uniform(GEOMETRY, kind)
    assert [chunk.layer_idx for chunk in layout.chunks] == list(GEOMETRY.saved_layers(kind))
    assert {chunk.kind for chunk in layout.chunks} == {kind}
    assert {chunk.num_bytes for chunk in layout.chunks} == {GEOMETRY.chunk_bytes(kind)}
    assert (layout.num_bytes, layout.num_layers) == (GEOMETRY.span_bytes(kind), 40)
    assert layout.first_stored == GEOMETRY.saved_layers(kind).start
    assert SpanLayout.uniform(GEOMETRY, kind) is layout


def test_the_papers_mixture_by_hand():
    """Bubble-free for a 13B model: layer 0 from token ids, then hidden states, the last four layers as K and V."""
    layout = SpanLayout.of(GEOMETRY, [None] + [HIDDEN] * 35 + [KV] * 4)
    assert (layout.num_chunks, layout.first_stored) == (39, 1)
    assert layout.num_bytes == 35 * 64 * 10_240 + 4 * 64 * 20_480
    assert dict(layout.kind_counts) == {HIDDEN: 35, KV: 4}
    assert layout.chunks[35] == (36, KV, 64 * 20_480, 35 * 64 * 10_240, 0)
    recomputed = SpanLayout.of(GEOMETRY, [None] * 8 + [HIDDEN] * 32)
    assert (recomputed.first_stored, recomputed.chunk_of(8), recomputed.chunk_of(7)) == (8, 0, None)
    assert SpanLayout.of(GEOMETRY, [KV] * 39 + [None]).first_stored == 40


def test_kv_layers_are_shared_by_heads_and_hidden_ones_not_at_all():
    kinds = [None] + [HIDDEN] * 35 + [KV] * 4
    whole, shared = SpanLayout.of(GEOMETRY, kinds), SpanLayout.of(GEOMETRY, kinds, 4)
    assert shared.num_bytes == whole.num_bytes, "40 heads, 10 a rank"
    assert (shared.num_chunks, shared.kv_chunk_bytes) == (35 + 4 * 4, whole.kv_chunk_bytes // 4)
    assert shared.chunks[-1][:3] == (39, KV, 64 * 5120) and shared.chunks[-1].shard == 3
    assert SpanLayout.uniform(GEOMETRY, HIDDEN, 4) is SpanLayout.uniform(GEOMETRY, HIDDEN)
    few = dataclasses.replace(GEOMETRY, num_kv_heads=2)
    assert SpanLayout.uniform(few, KV, 4).num_bytes == 2 * SpanLayout.uniform(few, KV).num_bytes, "each head twice"
    with pytest.raises(ValueError, match="3 ranks cannot share 40 KV heads evenly"):
        SpanLayout.of(GEOMETRY, kinds, 3)
    with pytest.raises(ValueError, match="kv_shards must be 1 to 64, and 1 without kv layers, got 2"):
        SpanLayout.shared((HIDDEN,), 1, 1, 2)
