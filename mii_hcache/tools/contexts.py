"""Contexts of a catalog: which conversations its spans make up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.identity import SpanId
from mii_hcache.storage.catalog import SpanRow


@dataclass(frozen=True, kw_only=True)
class ContextView:
    """A chain of spans up to one that no other follows."""

    last_span: SpanId
    num_tokens: int
    kinds: tuple[str, ...]
    num_bytes: int
    """Payload of all its spans."""
    own_bytes: int
    """Payload of the spans that no other context has."""
    use_rank: int
    """1 for the context that was used last. The catalog keeps the order of use, not its times."""
    first_token: int
    """Where the chain begins; above 0 an earlier span is missing, and nothing of the context can be restored."""


def contexts_of(rows: Sequence[SpanRow]) -> list[ContextView]:
    """All contexts, the one used last first."""
    by_id = {row.record.span_id: row for row in rows}
    parents = {row.record.parent_id for row in rows}
    leaves = [row for row in rows if row.record.span_id not in parents]
    chains = [_chain(leaf, by_id) for leaf in leaves]
    num_users = Counter(row.record.span_id for chain in chains for row in chain)
    chains.sort(key=lambda chain: -chain[0].last_used)
    return [
        ContextView(
            last_span=chain[0].record.span_id,
            num_tokens=SPAN_TOKENS * (chain[0].record.span_idx + 1),
            kinds=tuple(sorted({name for row in chain for name in row.record.layout.kind_names})),
            num_bytes=sum(row.record.num_bytes for row in chain),
            own_bytes=sum(row.record.num_bytes for row in chain if num_users[row.record.span_id] == 1),
            use_rank=rank,
            first_token=SPAN_TOKENS * chain[-1].record.span_idx,
        )
        for rank, chain in enumerate(chains, start=1)
    ]


def _chain(leaf: SpanRow, by_id: dict[SpanId, SpanRow]) -> list[SpanRow]:
    """From the last span towards the first, as far as they are there."""
    chain, row = [leaf], leaf
    while row.record.parent_id is not None and row.record.span_idx > 0 and row.record.parent_id in by_id:
        row = by_id[row.record.parent_id]
        if row.record.span_idx >= chain[-1].record.span_idx:
            break  # no chain at all: indices only go down
        chain.append(row)
    return chain
