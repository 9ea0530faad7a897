"""What the saver knows of one live sequence: its tokens, its chain of spans, and the span that is filling up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.identity import SpanId, next_span_id, pack_tokens
from mii_hcache.core.layout import SpanLayout
from mii_hcache.storage.records import SpanRecord


@dataclass(eq=False, kw_only=True)
class OpenSpan:
    """Hidden rows of a span that is not whole yet; one background thread copies them in, in the order of the steps.

    Once every snapshot so far is copied it holds all rows, at least one, that its sequence has of this span.
    """

    span_idx: int
    rows: torch.Tensor
    """`[num_layers, SPAN_TOKENS, row_elements]`, host."""
    layout: SpanLayout | None = None
    """As what the span will be stored, where it is known."""
    is_damaged: bool = False
    """Rows could not be copied in: never put. Belongs to the background thread."""

    @cached_property
    def place(self) -> RowsPlace:
        """Where the rows lie."""
        return RowsPlace(self.rows)


class RowsPlace:
    """Where rows `[num_layers, num_rows, row_elements]` lie in memory; keeps none alive."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.num_layers, self.num_rows, self.row_elements = rows.shape
        self.dtype = rows.dtype
        self.is_plain = rows.is_cpu and rows.stride()[1:] == (self.row_elements, 1)
        """On the host, each layer's part contiguous."""
        self.row_bytes = self.row_elements * rows.itemsize
        self.layer_bytes = rows.stride(0) * rows.itemsize
        """From one layer to the next."""
        self.address = rows.data_ptr()


class SequenceTrack:
    """Tokens and span ids of one live sequence. Engine thread only."""

    def __init__(
        self, *, uid: int, seed: bytes, token_ids: Sequence[int], left_out: frozenset[SpanId] = frozenset()
    ) -> None:
        self.uid = uid
        """The engine's name of the sequence."""
        self._seed = seed
        self.token_ids: list[int] = list(token_ids)
        """Tokens whose K and V are in the blocks (the last generated token is not, until it is fed back)."""
        self.left_out = left_out
        """Spans that are not to be saved: the store gave them up, and saved anew they would be the next to go."""
        self.span_ids: list[SpanId] = []
        self._packed: list[bytes] = []
        self.open_span: OpenSpan | None = None
        self._name_spans()

    @property
    def num_spans(self) -> int:
        """Whole spans of the tokens so far."""
        return len(self.span_ids)

    def packed_tokens(self, span_idx: int) -> bytes:
        """A whole span's token ids, packed."""
        return self._packed[span_idx]

    def parent_id(self, span_idx: int) -> SpanId | None:
        """Id of the span before, None for the first."""
        return self.span_ids[span_idx - 1] if span_idx else None

    def record(self, span_idx: int, layout: SpanLayout) -> SpanRecord:
        """What a whole span is, stored as `layout` says."""
        return SpanRecord(
            span_id=self.span_ids[span_idx],
            parent_id=self.parent_id(span_idx),
            span_idx=span_idx,
            token_ids=self.packed_tokens(span_idx),
            layout=layout,
            root_id=self.span_ids[0],
        )

    def extend(self, token_ids: Sequence[int]) -> None:
        """Tokens that a step is about to run."""
        self.token_ids.extend(token_ids)
        if len(self.token_ids) // SPAN_TOKENS > len(self.span_ids):
            self._name_spans()

    def truncate(self, num_tokens: int) -> OpenSpan | None:
        """Forget tokens from `num_tokens` on. Returns the open span if it is of no use any more.

        An open span that the cut goes through stays: rows before the cut are right, later ones will be overwritten. One
        that it leaves without rows goes: the same span may be saved from elsewhere, and then be cut and continued.
        """
        del self.token_ids[num_tokens:]
        num_spans, num_rows = divmod(num_tokens, SPAN_TOKENS)
        del self.span_ids[num_spans:]
        del self._packed[num_spans:]
        if self.open_span is not None and (self.open_span.span_idx != num_spans or num_rows == 0):
            return self.close_open_span()
        return None

    def close_open_span(self) -> OpenSpan | None:
        """Detach the open span."""
        open_span, self.open_span = self.open_span, None
        return open_span

    def _name_spans(self) -> None:
        for span_idx in range(len(self.span_ids), len(self.token_ids) // SPAN_TOKENS):
            start = span_idx * SPAN_TOKENS
            packed = pack_tokens(self.token_ids[start : start + SPAN_TOKENS])
            parent = self.span_ids[-1] if self.span_ids else self._seed
            self._packed.append(packed)
            self.span_ids.append(next_span_id(parent, packed))
