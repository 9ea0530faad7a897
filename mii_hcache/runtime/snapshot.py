"""What a step leaves behind to be saved: rows on their way into open spans, and spans that are whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mii_hcache.runtime.streams import Event
from mii_hcache.runtime.track import OpenSpan
from mii_hcache.storage.records import SpanRecord


@dataclass(frozen=True, kw_only=True)
class SpanPut:
    """A whole span, ready once its snapshot's rows are there."""

    record: SpanRecord
    rows: Sequence[torch.Tensor]
    """Of each chunk that is this rank's, in the order of the record's layout: `[SPAN_TOKENS, ...]`, host,
    contiguous."""
    put_id: int = 0
    """By which several ranks speak of it; 0 where there is one."""
    releases: Sequence[Callable[[], None]] = ()
    """Called when the rows are no longer needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCopy:
    """Rows on their way from a snapshot into an open span."""

    source: torch.Tensor
    """`[num_layers, num_rows, row_elements]`, host; each layer's part is contiguous."""
    target: OpenSpan
    span_row: int
    completes: SpanPut | None = None
    """The span that these rows complete, if it is to be put."""


@dataclass(kw_only=True)
class Snapshot:
    """What one step, or one read from blocks, left behind."""

    ready: list[Event] = field(default_factory=list)
    """The copies to host memory are done after these events; background threads wait for them."""
    copies: list[RowCopy] = field(default_factory=list)
    """To different spans: they may be made in any order, or at once."""
    whole: list[SpanPut] = field(default_factory=list)
    release: Callable[[], None] | None = None
    """Called when copies and whole spans no longer need the snapshot's memory."""
    discard: list[Callable[[], None]] = field(default_factory=list)
    """Called after this and every earlier snapshot's copies."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do for it."""
        return self.release is None and not self.whole and not self.discard

    @property
    def puts(self) -> list[SpanPut]:
        """All spans that are put because of it."""
        return [*self.whole, *(copy.completes for copy in self.copies if copy.completes is not None)]
