"""Stage 1 of saving: each layer's rows of a running step, copied in stream order on their way into the host ring.

The engine's norm reuses its output buffer, so a row must be copied on the main stream before the next norm runs: one
small copy for each saved layer, into the stage (`stage.py`). When the step has been launched, all its rows leave for
the host in one copy, on another stream. On a CPU the ring itself takes the rows.

Nothing here waits for a device: only the events that `end` returns are waited for, by background threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from mii_hcache.runtime.buffers import RowLease, RowRing
from mii_hcache.runtime.stage import Stage, StagedPart
from mii_hcache.runtime.streams import Event, Stream


class StepCapture(ABC):
    """Rows of one step at a time: `begin`, `copy` once per saved layer, then `end` or `abort`. Engine thread only."""

    def __init__(self, ring: RowRing) -> None:
        self.ring = ring
        self._lease: RowLease | None = None
        self._rows: list[torch.Tensor] = []
        """Where each saved layer's rows go, `[num_rows, row_elements]`."""

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

    @abstractmethod
    def copy(self, saved_idx: int, hidden: torch.Tensor) -> None:
        """Rows `[num_rows, row_elements]` of the `saved_idx`-th saved layer, in stream order."""

    def end(self) -> tuple[RowLease | None, Event | None]:
        """The step's rows, and the event after which they are there (None: they are). The caller gives the lease back
        to the ring, after the event."""
        lease, self._lease = self._lease, None
        return lease, None if lease is None else self._send(lease)

    @abstractmethod
    def _send(self, lease: RowLease) -> Event | None: ...

    def abort(self) -> None:
        """Give the room back: the step failed. Its copies may still be under way on the device; none is to the host."""
        if self._lease is not None:
            self.ring.release(self._lease)
            self._lease = None


class HostCapture(StepCapture):
    """The engine computes on the CPU."""

    def _place(self, lease: RowLease) -> list[torch.Tensor]:
        return list(lease.rows.unbind())

    def copy(self, saved_idx: int, hidden: torch.Tensor) -> None:
        if self._lease is not None:
            self._rows[saved_idx].copy_(hidden)

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

    def copy(self, saved_idx: int, hidden: torch.Tensor) -> None:
        if self._lease is not None:
            self._main.copy(self._rows[saved_idx], hidden)

    def _send(self, lease: RowLease) -> Event | None:
        sizes = [part.memory.numel() for part in self._parts]
        targets = torch.split(lease.rows.view(-1).view(torch.uint8), sizes)
        return self._stage.send(list(zip(targets, self._parts, strict=True)))


def make_capture(ring: RowRing, *, stage: Stage | None, main: Stream) -> StepCapture:
    """The capture for an engine that computes on `main`; `stage` None: on the CPU."""
    return HostCapture(ring) if stage is None else StagedCapture(ring, stage=stage, main=main)
