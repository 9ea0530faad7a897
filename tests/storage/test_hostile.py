"""Rows that an attacker, or a miracle, made with all their checksums right: parsed as what they say, or refused."""

from __future__ import annotations

import struct
from array import array

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.catalog import SpanRow, _pack, _parse, _row_crc
from mii_hcache.storage.slots import Places
from tests.storage.storage_kit import MIXED, NUM_CHUNKS, make_record

ROW = _pack(
    SpanRow(
        record=make_record("a", parent="b", span_idx=3, layout=MIXED),
        generation=7,
        places=Places((1, idx) for idx in range(NUM_CHUNKS)),
        crcs=array("I", range(NUM_CHUNKS)),
        last_used=5,
    )
)
NUM_FIELDS = len(ROW) - 2

anything = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=100),
    st.sampled_from([0, 1, -1, b"", b"\0", b"\1\2", bytes(32), bytes(36), b"\xff" * 36]),
)
"""What SQLite may hold in any column."""


@given(replaced=st.dictionaries(st.integers(0, NUM_FIELDS - 1), anything, max_size=3), last_used=anything)
@example(replaced={}, last_used=5)
@example(replaced={}, last_used=2**63 - 1)
@example(replaced={7: -1}, last_used=5)
@example(replaced={7: 2**63 - 1}, last_used=5)
@settings(max_examples=500, deadline=None)
def test_any_row_is_what_it_says_or_refused(replaced, last_used):
    fields = [replaced.get(idx, ROW[idx]) for idx in range(NUM_FIELDS)]
    try:
        crc = _row_crc(fields)
    except (TypeError, struct.error):
        crc = 0
    row = (*fields, crc, last_used)
    try:
        parsed = _parse(row)
    except CorruptChunkError:
        assert replaced or not (isinstance(last_used, int) and 0 <= last_used <= 1 << 62), "a sound row was refused"
        return
    assert _pack(parsed) == row
    assert parsed.generation + 1 < 2**63 and parsed.last_used + 1 < 2**63, "what is counted on from can be saved"
    assert parsed.generation >= 0, "no slot's header can say it"
