"""Bytes per row, chunk and span, by kind."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.core.geometry import DTYPE_BYTES, SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.errors import ConfigError

LLAMA_2_7B = ModelGeometry(
    num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, head_size=128, dtype="float16"
)

geometries = st.builds(
    ModelGeometry,
    num_layers=st.integers(1, 100),
    hidden_size=st.integers(1, 20_000),
    num_heads=st.integers(1, 128),
    num_kv_heads=st.integers(1, 128),
    head_size=st.integers(1, 512),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
)


def test_llama_2_7b_by_hand():
    """The paper's first model: hidden states take half of K and V, and a layer less."""
    assert LLAMA_2_7B.dtype_bytes == 2
    assert LLAMA_2_7B.row_bytes(ChunkKind.HIDDEN) == 8192
    assert LLAMA_2_7B.row_bytes(ChunkKind.KV) == 16384
    assert LLAMA_2_7B.chunk_bytes(ChunkKind.HIDDEN) == 512 * 1024
    assert LLAMA_2_7B.span_bytes(ChunkKind.HIDDEN) == 31 * 512 * 1024
    assert LLAMA_2_7B.span_bytes(ChunkKind.KV) == 32 * 1024 * 1024
    assert LLAMA_2_7B.bytes_per_token(ChunkKind.KV) == 512 * 1024
    assert LLAMA_2_7B.bytes_per_token(ChunkKind.HIDDEN) == 31 * 8192


def test_layer_zero_has_no_hidden_chunk():
    assert LLAMA_2_7B.saved_layers(ChunkKind.HIDDEN) == range(1, 32)
    assert LLAMA_2_7B.saved_layers(ChunkKind.KV) == range(32)


def test_kv_rows_follow_the_kv_heads():
    one_in_four = dataclasses.replace(LLAMA_2_7B, num_kv_heads=8)
    assert one_in_four.row_elements(ChunkKind.KV) == 2 * 8 * 128
    assert one_in_four.row_elements(ChunkKind.HIDDEN) == LLAMA_2_7B.row_elements(ChunkKind.HIDDEN)


@given(geometry=geometries, kind=st.sampled_from(ChunkKind))
def test_sizes_add_up(geometry, kind):
    assert geometry.row_bytes(kind) == geometry.row_elements(kind) * DTYPE_BYTES[geometry.dtype]
    assert geometry.chunk_bytes(kind) == SPAN_TOKENS * geometry.row_bytes(kind)
    assert geometry.span_bytes(kind) == sum(geometry.chunk_bytes(kind) for _ in geometry.saved_layers(kind))
    assert geometry.bytes_per_token(kind) * SPAN_TOKENS == geometry.span_bytes(kind)


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be > 0, got {value}"):
        dataclasses.replace(LLAMA_2_7B, **{name: value})


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        dataclasses.replace(LLAMA_2_7B, dtype="int8")
