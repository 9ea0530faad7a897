"""Spans of any layouts, over every store."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mii_hcache.storage.records import ReadOutcome
from tests.storage.storage_kit import holds, layouts, make_chunks, make_id, make_record, put, reads_of


@pytest.mark.parametrize("layout", ["uniform"], indirect=True)  # each example has its own
@given(layouts=st.lists(layouts, min_size=1, max_size=5))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_spans_of_any_layouts_come_back_also_in_pieces(kit, layouts):
    store = kit.open(8 << 20)
    records = [make_record(f"any{idx}", layout=layout) for idx, layout in enumerate(layouts)]
    store.delete([make_id(f"any{idx}") for idx in range(5)])  # of the example before
    assert all(put(store, record) for record in records)
    store.flush()
    assert [store.find(record.span_id) for record in records] == records
    assert store.stats().num_bytes == sum(layout.num_bytes for layout in layouts)
    for layer_idx in range(max(layout.num_layers for layout in layouts)):
        stored = [
            (record, idx)
            for record in records
            for idx, chunk in enumerate(record.layout.chunks)
            if chunk.layer_idx == layer_idx
        ]
        reads = [reads_of(record)[idx] for record, idx in stored]
        assert store.get_into(reads) == ReadOutcome(num_ok=len(reads))
        expected = [make_chunks(record)[idx] for record, idx in stored]
        assert [read.out for read in reads] == expected
    assert all(holds(store, record) for record in records)
    if kit.kind != "memory":
        store = kit.open(8 << 20)
        assert all(holds(store, record) for record in records)
