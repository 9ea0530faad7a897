"""Rows get where they belong, whoever copies them; what does not fit is refused before anything is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.runtime.scatter import MAX_THREADS, NativeScatter, TorchScatter, make_scatter
from mii_hcache.runtime.snapshot import RowCopy
from mii_hcache.runtime.track import OpenSpan
from tests.runtime.kit import SCATTERS, scatter_named

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _span(num_layers: int, width: int, dtype: torch.dtype) -> OpenSpan:
    return OpenSpan(span_idx=0, rows=torch.full((num_layers, SPAN_TOKENS, width), -1.0, dtype=dtype))


@given(
    num_layers=st.integers(1, 5),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    parts=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 64)), min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", SCATTERS)
def test_a_batch_of_rows_is_scattered_as_slices_are_assigned(name, num_layers, width, dtype, parts):
    """The rows of several sequences, side by side in a ring, each to a place of its own."""
    scatter = scatter_named(name)
    parts = [(row, min(num_rows, SPAN_TOKENS - row)) for row, num_rows in parts]
    total = sum(num_rows for _, num_rows in parts)
    ring = torch.randint(0, 99, (num_layers, total + 3, width)).to(dtype)
    copies, expected, start = [], [], 1
    for span_row, num_rows in parts:
        span, model = _span(num_layers, width, dtype), _span(num_layers, width, dtype).rows
        source = ring[:, start : start + num_rows]
        model[:, span_row : span_row + num_rows] = source
        copies.append(RowCopy(source=source, target=span, span_row=span_row))
        expected.append(model)
        start += num_rows
    scatter.run(copies)
    for copy, model in zip(copies, expected, strict=True):
        assert torch.equal(copy.target.rows, model)


def _misfits() -> dict[str, RowCopy]:
    span = _span(2, 8, torch.float32)
    rows = torch.zeros(2, 3, 8)
    return {
        "beyond the span": RowCopy(source=rows, target=span, span_row=62),
        "other layers": RowCopy(source=torch.zeros(3, 3, 8), target=span, span_row=0),
        "other width": RowCopy(source=torch.zeros(2, 3, 9), target=span, span_row=0),
        "before the span": RowCopy(source=rows, target=span, span_row=-1),
        "other type": RowCopy(source=rows.to(torch.bfloat16), target=span, span_row=0),
        "not contiguous": RowCopy(source=torch.zeros(2, 3, 16)[:, :, ::2], target=span, span_row=0),
        "another device": RowCopy(source=rows.to("meta"), target=span, span_row=0),
    }


@pytest.mark.parametrize("what", _misfits())
def test_the_native_scatter_refuses_what_would_lead_it_astray(what):
    scatter, misfit = scatter_named("native"), _misfits()[what]
    good = RowCopy(source=torch.ones(2, 3, 8), target=_span(2, 8, torch.float32), span_row=0)
    with pytest.raises(ValueError, match="do not fit"):
        scatter.run([good, misfit])
    assert (misfit.target.rows == -1).all() and (good.target.rows == -1).all()


def test_the_native_scatter_is_taken_where_it_was_built(monkeypatch):
    scatter_named("native")
    assert isinstance(make_scatter(), NativeScatter)
    monkeypatch.setattr("mii_hcache.runtime.scatter.why_not_built", lambda: "there is no compiler")
    assert isinstance(make_scatter(), TorchScatter)


@pytest.mark.parametrize(("num_cpus", "num_threads"), [(1, 1), (2, 1), (6, 3), (16, 8), (128, MAX_THREADS)])
def test_half_the_cores_scatter_and_eight_at_most(monkeypatch, num_cpus, num_threads):
    scatter_named("native")
    made = []
    monkeypatch.setattr("mii_hcache.runtime.scatter.num_usable_cpus", lambda: num_cpus)
    monkeypatch.setattr("mii_hcache.runtime.scatter.new_copier", lambda num_threads: made.append(num_threads))
    make_scatter()
    make_scatter(5)
    assert made == [num_threads, 5]
