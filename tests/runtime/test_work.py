"""Fills and tiles cover every cell of a history once, in an order that a forward can follow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.layout import SpanLayout
from mii_hcache.runtime.work import plan_fills, plan_tiles

NUM_LAYERS = 4
KINDS = st.sampled_from([None, *ChunkKind])


def _layout(kinds):
    return SpanLayout(kinds=tuple(kinds), hidden_chunk_bytes=64, kv_chunk_bytes=128)


layouts = st.lists(
    st.lists(KINDS, min_size=NUM_LAYERS, max_size=NUM_LAYERS).filter(any).map(_layout), min_size=1, max_size=6
)


@given(
    layouts=layouts,
    recompute_spans=st.integers(0, 6),
    recompute_layers=st.integers(0, 4),
    size=st.integers(1, 4),
    first_spans=st.none() | st.integers(1, 5),
)
def test_every_cell_comes_from_one_place(layouts, recompute_spans, recompute_layers, size, first_spans):
    recompute_tokens = min(recompute_spans, len(layouts)) * SPAN_TOKENS
    chosen = {"recompute_tokens": recompute_tokens, "recompute_layers": recompute_layers}
    fills = plan_fills(layouts, num_layers=NUM_LAYERS, **chosen)
    filled: dict[tuple[int, int], int] = {}
    for fill in fills:
        assert fill.start < fill.stop <= len(layouts) * SPAN_TOKENS
        for token in range(fill.start, fill.stop):
            for layer in range(fill.num_layers):
                if layer < fill.num_layers - 1:  # a whole layer attends to every earlier token
                    assert all((layer, earlier) in filled for earlier in range(token))
                assert (layer, token) not in filled
                filled[layer, token] = 1
    read: set[tuple[int, int]] = set()
    order = []
    for tile in plan_tiles(layouts, tile_spans=size, first_spans=first_spans, **chosen):
        order.append((tile.layer_idx, tile.first_span))
        assert 1 <= tile.num_spans <= size
        for span in range(tile.first_span, tile.first_span + tile.num_spans):
            assert layouts[span].kinds[tile.layer_idx] is tile.kind
            for token in range(span * SPAN_TOKENS, (span + 1) * SPAN_TOKENS):
                assert (tile.layer_idx, token) not in filled and (tile.layer_idx, token) not in read
                read.add((tile.layer_idx, token))
    assert order == sorted(order)
    every = {(layer, token) for layer in range(NUM_LAYERS) for token in range(len(layouts) * SPAN_TOKENS)}
    assert filled.keys() | read == every
    if recompute_layers > 1 and recompute_tokens < len(layouts) * SPAN_TOKENS:
        assert all((layer, recompute_tokens) in filled for layer in range(min(recompute_layers, NUM_LAYERS)))


def test_a_missing_first_layer_costs_only_the_spans_that_lack_it():
    hidden, kv = _layout([None, ChunkKind.HIDDEN]), _layout([ChunkKind.KV, ChunkKind.KV])
    fills = plan_fills([hidden, kv, kv, hidden], num_layers=2, recompute_tokens=0, recompute_layers=0)
    assert [(fill.start, fill.stop, fill.num_layers) for fill in fills] == [(0, 64, 1), (192, 256, 1)]


def test_the_first_tiles_are_short():
    layouts = [_layout([ChunkKind.KV, ChunkKind.HIDDEN])] * 20
    chosen = {"recompute_tokens": 0, "recompute_layers": 0, "tile_spans": 8}
    tiles = list(plan_tiles(layouts, first_spans=3, **chosen))
    assert [tile.num_spans for tile in tiles if tile.layer_idx == 0] == [3, 6, 8, 3]
    assert [tile.num_spans for tile in tiles if tile.layer_idx == 1] == [8, 8, 4]
    assert [tile.num_spans for tile in plan_tiles(layouts, **chosen)] == [8, 8, 4] * 2
