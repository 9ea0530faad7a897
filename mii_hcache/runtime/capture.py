"""Stage 1 of saving: each layer's rows of a running step, copied in stream order into the host ring.

The engine's norm reuses its output buffer, so a row must be copied on the compute stream before the next norm runs. On
a GPU the copy goes to a staging buffer on the device (fast), and one copy per layer goes on to pinned host memory on a
stream of its own after the step; two staging buffers alternate. On a CPU the ring itself is the staging buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from mii_hcache.runtime.buffers import RowLease, RowRing


class StepCapture(ABC):
    """Rows of one step at a time: `begin`, `copy` once per saved layer, then `end` or `abort`. Engine thread only."""

    def __init__(self, ring: RowRing) -> None:
        self.ring = ring
        self._lease: RowLease | None = None

    def begin(self, num_rows: int, wait_s: float) -> bool:
        """Take room for a step. False: none within `wait_s`; the step's rows are dropped and `end` gives no lease."""
        self._lease = self.ring.acquire(num_rows, wait_s)
        return self._lease is not None

    @abstractmethod
    def copy(self, saved_idx: int, hidden: torch.Tensor) -> None:
        """Rows `[num_rows, row_elements]` of the `saved_idx`-th saved layer, in stream order."""

    @abstractmethod
    def end(self) -> tuple[RowLease | None, torch.cuda.Event | None]:
        """The step's rows, and the event after which they are there (None: they are)."""

    def abort(self) -> None:
        """Give the room back: the step failed."""
        if self._lease is not None:
            self.ring.release(self._lease)
            self._lease = None


class HostCapture(StepCapture):
    """The engine computes on the CPU."""

    def copy(self, saved_idx: int, hidden: torch.Tensor) -> None:
        if self._lease is not None:
            self._lease.rows[saved_idx].copy_(hidden)

    def end(self) -> tuple[RowLease | None, torch.cuda.Event | None]:
        lease, self._lease = self._lease, None
        return lease, None


class CudaCapture(StepCapture):
    """The engine computes on a GPU. Not run on hardware yet."""

    def __init__(self, ring: RowRing, *, num_layers: int, max_rows: int, row_elements: int, like: torch.Tensor) -> None:
        super().__init__(ring)
        shape = (num_layers, max_rows, row_elements)
        self._staging = [like.new_empty(shape) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._stream = torch.cuda.Stream(like.device)  # type: ignore[no-untyped-call]

    def begin(self, num_rows: int, wait_s: float) -> bool:
        self._turn ^= 1
        sent = self._sent[self._turn]
        if sent is not None:
            torch.cuda.current_stream().wait_event(sent)  # the copy engine still reads what we are about to overwrite
        return super().begin(num_rows, wait_s)

    def copy(self, saved_idx: int, hidden: torch.Tensor) -> None:
        if self._lease is not None:
            self._staging[self._turn][saved_idx, : hidden.shape[0]].copy_(hidden)

    def end(self) -> tuple[RowLease | None, torch.cuda.Event | None]:
        lease, self._lease = self._lease, None
        if lease is None:
            return None, None
        self._stream.wait_stream(torch.cuda.current_stream())
        staging = self._staging[self._turn]
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            for saved_idx in range(staging.shape[0]):
                lease.rows[saved_idx].copy_(staging[saved_idx, : lease.num_rows], non_blocking=True)
            sent.record()
        self._sent[self._turn] = sent
        return lease, sent

    def abort(self) -> None:
        torch.cuda.synchronize()
        super().abort()


def make_capture(
    *, ring: RowRing, device: torch.device, num_layers: int, max_rows: int, row_elements: int, dtype: torch.dtype
) -> StepCapture:
    """The capture for an engine on `device`."""
    if device.type == "cpu":
        return HostCapture(ring)
    like = torch.empty(0, dtype=dtype, device=device)
    return CudaCapture(ring, num_layers=num_layers, max_rows=max_rows, row_elements=row_elements, like=like)
