"""Why spans that were there are gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from mii_hcache.core.identity import SpanId

MAX_REASONS = 65_536
"""Reasons remembered per store."""


class Reasons:
    """The last reasons by span, bounded. Not thread-safe: the owner's lock covers it."""

    def __init__(self, max_reasons: int = MAX_REASONS) -> None:
        self._max_reasons = max_reasons
        self._by_span: OrderedDict[SpanId, str] = OrderedDict()

    def note(self, span_ids: Iterable[SpanId], reason: str) -> None:
        """Remember `evicted`, `corrupt`, `deleted` or `expired` for spans."""
        for span_id in span_ids:
            self._by_span[span_id] = reason
            self._by_span.move_to_end(span_id)
        while len(self._by_span) > self._max_reasons:
            self._by_span.popitem(last=False)

    def clear(self, span_id: SpanId) -> None:
        """The span is there again."""
        self._by_span.pop(span_id, None)

    def of(self, span_id: SpanId) -> str:
        """The reason, `not_saved` when none is remembered."""
        return self._by_span.get(span_id, "not_saved")
