"""Stage 1 of saving: each layer's rows of a running step, on their way into the host ring.

The norm that makes a layer's rows writes them into the stage (`stage.py`), where the layer's QKV projection reads them:
saving a layer launches nothing. What a norm wrote elsewhere, in a buffer that it uses again, is copied on the main
stream before the next norm runs. When the step has been launched, all its rows leave for the host in one copy, on
another stream. On a CPU the ring itself takes the rows.

Rows stay as they are while a projection may read them, by the order of streams: a step's norms and projections are
launched on the main stream before `end`; the copy to the host comes after them and only reads; and the main stream, on
which the next rows at the same place are written, comes after both. A step that failed leaves its place to the next
one on the main stream, too.

Nothing here waits for a device: only the events that `end` returns are waited for, by background threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from mii_hcache.runtime.buffers import RowLease, RowRing
from mii_hcache.runtime.stage import Stage, StagedPart
from mii_hcache.runtime.streams import Event, Stream

_ALIGN_BYTES = 16
"""What kernels load at once: rows that begin elsewhere are not written to by a norm (they would be slower to read, and
Triton would compile another kernel for them under a request)."""


class StepCapture(ABC):
    """Rows of one step at a time: `begin`, `take` once per saved layer, then `end` or `abort`. Engine thread only."""

    def __init__(self, ring: RowRing) -> None:
        self.ring = ring
        self._lease: RowLease | None = None
        self._rows: list[torch.Tensor] = []
        """Where each saved layer's rows go, `[num_rows, row_elements]`; empty between steps and without room."""
        self._is_aligned = ring.row_bytes % _ALIGN_BYTES == 0

    def begin(self, num_rows: int, wait_s: float) -> bool:
        """Take room for a step. False: none within `wait_s`; the step's rows are dropped and `end` gives no lease."""
        self._lease = self.ring.acquire(num_rows, wait_s)
        self._rows = [] if self._lease is None else self._place(self._lease)
        return self._lease is not None

    @property
    def is_taking(self) -> bool:
        """Whether there is room for the running step."""
        return self._lease is not None

    @abstractmethod
    def _place(self, lease: RowLease) -> list[torch.Tensor]: ...

    def rows_for(self, saved_idx: int, num_rows: int) -> torch.Tensor | None:
        """Where the `saved_idx`-th saved layer's rows shall be written on the main stream, `[num_rows, row_elements]`,
        contiguous; None: no room for them, or no place to compute in."""
        if self._lease is None or not self._is_aligned or self._lease.num_rows != num_rows:
            return None
        return self._rows[saved_idx]

    def take(self, saved_idx: int, hidden: torch.Tensor) -> None:
        """The `saved_idx`-th saved layer's rows are there, or in `hidden`, `[num_rows, row_elements]`, from where they
        are copied in stream order."""
        if self._lease is not None and hidden is not self._rows[saved_idx]:
            self._copy(self._rows[saved_idx], hidden)

    @abstractmethod
    def _copy(self, rows: torch.Tensor, hidden: torch.Tensor) -> None: ...

    def end(self) -> tuple[RowLease | None, Event | None]:
        """The step's rows, and the event after which they are there (None: they are). The caller gives the lease back
        to the ring, after the event."""
        lease, self._lease, self._rows = self._lease, None, []
        return lease, None if lease is None else self._send(lease)

    @abstractmethod
    def _send(self, lease: RowLease) -> Event | None: ...

    def abort(self) -> None:
        """Give the room back: the step failed. Its norms, projections and copies may still be under way on the device;
        no copy is to the host."""
        if self._lease is not None:
            self.ring.release(self._lease)
            self._lease, self._rows = None, []


class HostCapture(StepCapture):
    """The engine computes on the CPU."""

    def _place(self, lease: RowLease) -> list[torch.Tensor]:
        return list(lease.rows.unbind())

    def _copy(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        rows.copy_(hidden)

    def _send(self, lease: RowLease) -> Event | None:
        return None


class StagedCapture(StepCapture):
    """The engine computes on a device with streams. Raced on a fake one in tests; on a GPU it has not run yet."""

    def __init__(self, ring: RowRing, *, stage: Stage, main: Stream) -> None:
        super().__init__(ring)
        self._stage = stage
        self._main = main
        self._parts: list[StagedPart] = []

    def _place(self, lease: RowLease) -> list[torch.Tensor]:
        num_layers, num_rows, row_elements = lease.rows.shape
        dtype = lease.rows.dtype
        self._parts = self._stage.take_rows(num_layers, num_rows * row_elements * dtype.itemsize)
        layers = [part.memory.view(dtype).view(-1, num_rows, row_elements) for part in self._parts]
        return [rows for part in layers for rows in part.unbind()]

    def _copy(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        self._main.copy(rows, hidden)

    def _send(self, lease: RowLease) -> Event | None:
        if len(self._parts) == 1:  # as a rule
            return self._stage.send([(lease.rows, self._parts[0])])
        sizes = [part.memory.numel() for part in self._parts]
        targets = torch.split(lease.rows.view(-1).view(torch.uint8), sizes)
        return self._stage.send(list(zip(targets, self._parts, strict=True)))


def make_capture(ring: RowRing, *, stage: Stage | None, main: Stream) -> StepCapture:
    """The capture for an engine that computes on `main`; `stage` None: on the CPU."""
    return HostCapture(ring) if stage is None else StagedCapture(ring, stage=stage, main=main)
