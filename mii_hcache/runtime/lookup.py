"""How much of a prompt the store can bring back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.identity import SpanId
from mii_hcache.storage.base import ChunkStore, SpanRecord


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """The restorable prefix of a prompt."""

    records: list[SpanRecord]
    """Consecutive spans from the start, each verified to hold the prompt's own token ids."""
    next_span: SpanId | None
    """The first span that is not there; None when every whole span is."""
    why_missing: str | None
    """Why `next_span` is not there."""

    @property
    def num_tokens(self) -> int:
        """Tokens that can be restored."""
        return len(self.records) * SPAN_TOKENS


def look_up(store: ChunkStore, spans: Sequence[tuple[SpanId, bytes]], *, max_tokens: int) -> Lookup:
    """Walk a prompt's spans (`core.identity.spans_of`) while the store has them; at most `max_tokens` tokens."""
    records: list[SpanRecord] = []
    for span_idx, (span_id, packed) in enumerate(spans[: max_tokens // SPAN_TOKENS]):
        record = store.find(span_id)
        if record is None:
            return Lookup(records=records, next_span=span_id, why_missing=store.why_missing(span_id))
        if record.token_ids != packed or record.span_idx != span_idx:
            # Equal ids over different tokens: a broken catalog or a hash collision. Either way not this prompt's state.
            return Lookup(records=records, next_span=span_id, why_missing="mismatch")
        records.append(record)
    return Lookup(records=records, next_span=None, why_missing=None)
