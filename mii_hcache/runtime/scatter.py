"""Copies of a snapshot's rows into open spans: by the native engine's threads where it was built, else by torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from mii_hcache.runtime.machine import num_usable_cpus
from mii_hcache.runtime.snapshot import RowCopy
from mii_hcache.storage.native import new_copier, why_not_built

MAX_THREADS = 8
"""The paper's number of threads; more than half the cores are not taken."""


class Scatter(ABC):
    """Copies rows. One call at a time; any thread."""

    @abstractmethod
    def run(self, copies: Sequence[RowCopy]) -> None:
        """Do all copies, which go to different spans. Blocks; other Python threads run meanwhile. The caller keeps both
        sides alive until the return; nothing touches them later. Raises ValueError or RuntimeError when a source does
        not fit its target; then any of the copies may have been made."""


class TorchScatter(Scatter):
    """One strided copy after the other, each by as many threads as torch computes with."""

    def run(self, copies: Sequence[RowCopy]) -> None:
        for copy in copies:
            num_rows = copy.source.shape[1]
            copy.target.rows[:, copy.span_row : copy.span_row + num_rows] = copy.source


class NativeScatter(Scatter):
    """All copies in one call of `csrc/io/copier.hpp`, by threads of its own: torch's stay with the engine."""

    def __init__(self, num_threads: int, **settings: int) -> None:
        """At most `num_threads` work on a snapshot, the caller among them. Only where the native engine was built."""
        self.num_threads = num_threads
        self._copier = new_copier(num_threads, **settings)

    def run(self, copies: Sequence[RowCopy]) -> None:
        self._copier.scatter([_addresses(copy) for copy in copies])


def make_scatter(num_threads: int | None = None) -> Scatter:
    """The native one where it was built. `num_threads` work on a snapshot; None is half the cores, 8 at most."""
    if why_not_built() is not None:
        return TorchScatter()
    return NativeScatter(num_threads or max(1, min(MAX_THREADS, num_usable_cpus() // 2)))


def _addresses(copy: RowCopy) -> tuple[int, int, int, int, int, int]:
    """What `_io.Copier.scatter` wants. The copier checks nothing: whatever could lead it astray is refused here. Holds
    the GIL, which the engine's thread wants: few calls, and what is known of the span is asked for once."""
    source, target, span_row = copy.source, copy.target.place, copy.span_row
    num_layers, num_rows, row_elements = source.shape
    stride = source.stride()
    if (
        not target.is_plain
        or target.num_layers != num_layers
        or target.row_elements != row_elements
        or not 0 <= span_row <= target.num_rows - num_rows
        or source.dtype is not target.dtype
        or not source.is_cpu
        or stride[1] != row_elements
        or stride[2] != 1
    ):
        rows = copy.target.rows
        raise ValueError(
            f"{tuple(source.shape)} of {source.dtype}, stride {stride}, do not fit at row {span_row} of a span "
            f"{tuple(rows.shape)} of {rows.dtype}, stride {rows.stride()}"
        )
    row_bytes = target.row_bytes
    return (
        target.address + span_row * row_bytes,
        target.layer_bytes,
        source.data_ptr(),
        stride[0] * row_bytes // row_elements,
        num_rows * row_bytes,
        num_layers,
    )
