"""Host memory that state passes through: a ring of token rows, and a pool of span buffers."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mii_hcache.runtime.pinned import pinned_memory

_ALIGN_BYTES = 4096


def host_empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised host memory, pinned where there is a GPU to copy from (`pinned.py`), and aligned as O_DIRECT wants
    it: chunks go between it and the disk without a copy. Goes back to the system with the last tensor or view of it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    pinned = pinned_memory()
    if pinned is not None:
        return pinned.empty(num_bytes).view(dtype).view(shape)
    memory = torch.empty(num_bytes + _ALIGN_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % _ALIGN_BYTES
    return memory[start : start + num_bytes].view(dtype).view(shape)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A C-contiguous host tensor as writable bytes; shares memory, keeps the tensor alive."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} is not contiguous")
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(eq=False, kw_only=True)
class RowLease:
    """Rows `[start, start + num_rows)` of a ring, for every layer."""

    rows: torch.Tensor
    """`[num_layers, num_rows, row_elements]`, contiguous as a whole: one copy from the device fills it."""
    start: int
    num_rows: int
    _done: bool = field(default=False)


class RowRing:
    """Stage 1 of saving: a bounded ring of host rows, each of `num_layers` layers. A lease's rows lie together, all of
    its first layer before those of the next: where one lease ends and another begins depends on no layer.

    One thread acquires, any thread releases, in any order; space comes back in the order it was taken.
    """

    def __init__(self, *, num_layers: int, capacity_rows: int, row_elements: int, dtype: torch.dtype) -> None:
        self._memory = host_empty(capacity_rows, num_layers, row_elements, dtype=dtype)
        self._capacity = capacity_rows
        self._head = 0  # next row to hand out; == tail only when nothing is leased
        self._leases: deque[RowLease] = deque()
        self._freed = threading.Condition()

    @property
    def row_bytes(self) -> int:
        """Of one row of one layer."""
        return self._memory.shape[2] * self._memory.itemsize

    @property
    def capacity_rows(self) -> int:
        """Rows that fit when nothing is leased."""
        return self._capacity

    def acquire(self, num_rows: int, wait_s: float = 0.0) -> RowLease | None:
        """Rows that lie together, or None when there are none within `wait_s`."""
        if num_rows > self._capacity:
            raise ValueError(f"{num_rows} rows wanted from a ring of {self._capacity}")
        deadline = time.monotonic() + wait_s
        with self._freed:
            while (start := self._place(num_rows)) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._freed.wait(left)
            _, num_layers, row_elements = self._memory.shape
            rows = self._memory[start : start + num_rows].view(num_layers, num_rows, row_elements)
            lease = RowLease(rows=rows, start=start, num_rows=num_rows)
            self._head = start + num_rows
            self._leases.append(lease)
            return lease

    def _place(self, num_rows: int) -> int | None:
        if not self._leases:
            return 0
        tail = self._leases[0].start
        if self._head > tail:
            if self._capacity - self._head >= num_rows:
                return self._head
            return 0 if tail >= num_rows else None
        return self._head if tail - self._head >= num_rows else None

    def release(self, lease: RowLease) -> None:
        """Give rows back. The rows must not be touched afterwards."""
        with self._freed:
            lease._done = True
            while self._leases and self._leases[0]._done:
                self._leases.popleft()
            self._freed.notify_all()

    @property
    def leased_rows(self) -> int:
        """Rows that cannot be handed out: leased, or back but behind older ones that are not."""
        with self._freed:
            return sum(lease.num_rows for lease in self._leases)


IDLE_S = 60.0
"""Buffers that saving has not needed for so long are given back."""


class SpanBuffers:
    """A bounded pool of equal host buffers; made on first use, reused afterwards, and let go of when they were not
    needed for `idle_s`: what one busy hour took is not kept for ever. Any thread."""

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        max_buffers: int,
        on_made: Callable[[torch.Tensor], None] = lambda buffer: None,
        on_gone: Callable[[torch.Tensor], None] = lambda buffer: None,
        idle_s: float = math.inf,
    ) -> None:
        """`on_made` is told of each new buffer, by the thread that asked for it; `on_gone` of each one that is let go
        of, by a thread that gave another back. Nothing goes while nothing is given back."""
        self._on_made = on_made
        self._on_gone = on_gone
        self._idle_s = idle_s
        self._shape = shape
        self._dtype = dtype
        self._max = max_buffers
        self._made = 0
        self._free: deque[tuple[float, torch.Tensor]] = deque()
        """With the time when each was given back; the newest, at the end, is used first."""
        self._returned = threading.Condition()

    def acquire(self, wait_s: float = 0.0) -> torch.Tensor | None:
        """A buffer with anything in it, or None when all are in use for `wait_s`."""
        deadline = time.monotonic() + wait_s
        with self._returned:
            while not self._free and self._made >= self._max:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._returned.wait(left)
            if self._free:
                return self._free.pop()[1]
            self._made += 1
        try:
            buffer = host_empty(*self._shape, dtype=self._dtype)
            self._on_made(buffer)
            return buffer
        except BaseException:
            with self._returned:
                self._made -= 1
                self._returned.notify()
            raise

    def release(self, buffer: torch.Tensor) -> None:
        """Give a buffer back. It must not be touched afterwards."""
        now_s = time.monotonic()
        idle = []
        with self._returned:
            self._free.append((now_s, buffer))
            while self._free[0][0] < now_s - self._idle_s:
                idle.append(self._free.popleft()[1])
            self._made -= len(idle)
            self._returned.notify_all()
        for buffer in idle:
            self._on_gone(buffer)

    def wait_until_unused(self, timeout_s: float) -> bool:
        """Wait until every buffer is back; False when `timeout_s` ran out."""
        with self._returned:
            return self._returned.wait_for(lambda: len(self._free) == self._made, timeout_s)

    @property
    def num_in_use(self) -> int:
        """Buffers handed out and not yet back."""
        with self._returned:
            return self._made - len(self._free)
