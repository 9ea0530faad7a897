"""Which part of saved state is whose, where several ranks hold a model together (paper section 5)."""

from __future__ import annotations

from dataclasses import dataclass

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.layout import LayoutChunk, SpanLayout
from mii_hcache.storage.directions import Writer


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of `num_ranks` ranks saves, and reads when it comes back.

    Hidden rows are the same on all ranks, so each has those of every `num_ranks`-th span, by its position: all disks
    and links work on one restore. K and V are those of the rank's own heads, of every span.
    """

    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"rank must be 0 to {self.num_ranks - 1}, got {self.rank}")

    @property
    def is_whole(self) -> bool:
        """Whether there is nobody to share with."""
        return self.num_ranks == 1

    def has_hidden(self, span_idx: int) -> bool:
        """Whether the hidden rows of the span at this position are this rank's."""
        return span_idx % self.num_ranks == self.rank

    def has(self, span_idx: int, chunk: LayoutChunk) -> bool:
        """Whether a chunk of the span at this position is this rank's."""
        return self.has_hidden(span_idx) if chunk.kind is ChunkKind.HIDDEN else chunk.shard == self.rank

    def chunks(self, span_idx: int, layout: SpanLayout) -> list[int]:
        """Indexes of the chunks that are this rank's, in order."""
        return [idx for idx, chunk in enumerate(layout.chunks) if self.has(span_idx, chunk)]

    def writer_of(self, span_idx: int, layout: SpanLayout) -> Writer | None:
        """The rank that hidden rows of the span at this position are of; None where it has none, so that all ranks
        write as much of it."""
        if ChunkKind.HIDDEN not in layout.kind_counts:
            return None
        return Writer(idx=span_idx % self.num_ranks, num_writers=self.num_ranks)


WHOLE = Share()
"""Of the only rank: everything."""
