"""Models, plans and histories for tests of several ranks, and how they are saved."""

from __future__ import annotations

import dataclasses

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.plans import StoragePlan, uniform_storage
from tests.runtime.kit import SEED
from tests.runtime.ranks_kit import expected_chunks, spans_in

HIDDEN, KV = ChunkKind.HIDDEN, ChunkKind.KV
MHA = ModelGeometry(num_layers=3, hidden_size=8, num_heads=4, num_kv_heads=4, head_size=2, dtype="float32")
GQA = dataclasses.replace(MHA, num_kv_heads=2)
"""With 4 ranks, two of them have the same head."""
MIXED = StoragePlan(method="mixed", kinds=(None, HIDDEN, KV))
PLANS = {
    "hidden": uniform_storage(MHA, HIDDEN),
    "kv": uniform_storage(MHA, KV),
    "mixed": MIXED,
    "two patterns": StoragePlan(
        method="token-wise", kinds=(None, HIDDEN, HIDDEN), other_kinds=(KV, KV, KV), other_share=0.3
    ),
}
LENGTHS = (1, 63, 64, 65, 64 * 8 - 1, 64 * 8, 64 * 8 + 1, 64 * 9 + 30)


def run(ranks, saver, uid, tokens, pieces=(100, 1, 1, 30, 255)):
    """Feed a sequence in steps of ragged sizes."""
    at = 0
    for idx in range(len(tokens)):
        size = pieces[idx % len(pieces)]
        ranks.engines[0].step(saver, {uid: tokens[at : at + size]})
        at += size
        if at >= len(tokens):
            return


def save(ranks, store, plan, histories, **settings):
    saver = ranks.open_saver(store, plan, **settings)
    for tokens in histories:
        uid = ranks.engines[0].open()
        saver.open(uid, seed=SEED, token_ids=[])
        run(ranks, saver, uid, tokens)
        assert saver.heal(uid, 30.0)
        saver.close(uid)
        ranks.engines[0].evict(uid)
    assert saver.drain(30.0)
    ranks.settle()
    saver.stop()
    return saver


def check_saved(store, tokens, geometry):
    records = spans_in(store, tokens)
    assert len(records) == len(tokens) // SPAN_TOKENS
    for record in records:
        outs = [memoryview(bytearray(chunk.num_bytes)) for chunk in record.layout.chunks]
        outcome = store.get_into([record.read_of(idx, out) for idx, out in enumerate(outs)])
        assert outcome.num_ok == len(outs)
        assert [bytes(out) for out in outs] == expected_chunks(record, tokens, geometry)
    return records


def damage(store, record, chunk_idx):
    """Change a byte of a chunk where it lies."""
    store.flush()
    (held,) = [span for span in store._index._spans.values() if span.record.span_id == record.span_id]
    file, offset = store._segments.where(held.places[chunk_idx])
    import os

    byte = os.pread(file.fd, 1, offset + 9)
    os.pwrite(file.fd, bytes([byte[0] ^ 0x40]), offset + 9)
