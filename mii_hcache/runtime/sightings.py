"""How often each span of a prompt has come by: state that is never asked for again need not be saved."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from mii_hcache.core.identity import SpanId

MAX_SPANS = 1 << 20
"""Spans remembered; the ones not seen for longest are forgotten (about 170 bytes each)."""


class Sightings:
    """Counts per span id, bounded. One thread at a time."""

    def __init__(self, *, save_after: int, max_spans: int = MAX_SPANS) -> None:
        """A span is worth saving once it was part of `save_after` earlier prompts; 0: always."""
        self._save_after = save_after
        self._max_spans = max_spans
        self._counts: OrderedDict[SpanId, int] = OrderedDict()

    def note(self, span_ids: Iterable[SpanId]) -> None:
        """A prompt with these spans came."""
        if self._save_after == 0:
            return
        for span_id in span_ids:
            self._counts[span_id] = self._counts.pop(span_id, 0) + 1
        while len(self._counts) > self._max_spans:
            self._counts.popitem(last=False)

    def is_worth_saving(self, span_id: SpanId) -> bool:
        """Whether the span was part of enough prompts before the one that is running."""
        return self._save_after == 0 or self._counts.get(span_id, 0) > self._save_after
