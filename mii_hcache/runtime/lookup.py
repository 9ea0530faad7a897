"""How much of a prompt the store can bring back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.identity import SpanId
from mii_hcache.core.layout import SpanLayout
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.records import SpanRecord


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """The restorable prefix of a prompt."""

    records: list[SpanRecord]
    """Consecutive spans from the start, each verified to hold the prompt's own token ids. Those that the store lacks,
    where they may be filled in, have the layout `SpanLayout.nothing`; the last one is there."""
    next_span: SpanId | None
    """The first span that is not there; None when every whole span is."""
    why_missing: str | None
    """Why `next_span` is not there."""

    @property
    def num_tokens(self) -> int:
        """Tokens that can be restored."""
        return len(self.records) * SPAN_TOKENS

    @property
    def num_unbroken(self) -> int:
        """Leading spans that are there."""
        return next((idx for idx, record in enumerate(self.records) if not record.layout.num_chunks), len(self.records))

    def unbroken(self) -> Lookup:
        """Without what lies behind the first missing span."""
        return replace(self, records=self.records[: self.num_unbroken])


def look_up(
    store: ChunkStore,
    spans: Sequence[tuple[SpanId, bytes]],
    *,
    max_tokens: int,
    fill_layers: int = 0,
    num_ranks: int = 1,
) -> Lookup:
    """Walk a prompt's spans (`core.identity.spans_of`) while the store has them; at most `max_tokens` tokens.

    `fill_layers`: of a model whose missing spans can be computed; then the walk goes on to the last span that is there.
    A span's id vouches for all tokens before it, so what lies behind a gap is this prompt's all the same.

    K and V that other numbers of ranks saved than `num_ranks` are as good as missing, for `other_parallelism`.
    """
    records: list[SpanRecord] = []
    num_found = 0
    missing: tuple[SpanId, str] | None = None
    for span_idx, (span_id, packed) in enumerate(spans[: max_tokens // SPAN_TOKENS]):
        record = store.find(span_id)
        if record is not None and (record.token_ids != packed or record.span_idx != span_idx):
            # Equal ids over different tokens: a broken catalog or a hash collision. Either way not this prompt's state.
            missing = missing or (span_id, "mismatch")
            break
        if record is not None and not record.layout.suits(num_ranks):
            missing, record = missing or (span_id, "other_parallelism"), None
        if record is None:
            missing = missing or (span_id, store.why_missing(span_id))
            if not fill_layers:
                break
            record = SpanRecord(
                span_id=span_id,
                parent_id=spans[span_idx - 1][0] if span_idx else None,
                span_idx=span_idx,
                token_ids=packed,
                layout=SpanLayout.nothing(fill_layers),
            )
        else:
            num_found = span_idx + 1
        records.append(record)
    next_span, why_missing = missing or (None, None)
    return Lookup(records=records[:num_found], next_span=next_span, why_missing=why_missing)


def given_up(store: ChunkStore, records: Sequence[SpanRecord]) -> frozenset[SpanId]:
    """Those of a lookup's spans that the store evicted: saved anew they would be the next to go. `not_saved` is no
    choice of its: rows were dropped, a disk is missing, or the reason was forgotten at a restart."""
    lacking = (record.span_id for record in records if not record.layout.num_chunks)
    return frozenset(span_id for span_id in lacking if store.why_missing(span_id) == "evicted")
