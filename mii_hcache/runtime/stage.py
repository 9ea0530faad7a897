"""Memory on the device that state passes on its way to the host.

The engine overwrites what it computed with the next layer, and frees blocks for others; a copy to the host takes longer
than either, and the engine shall not wait for it. So its own stream puts state aside, in the stage (norms write there,
K and V are copied), and a stream of copies sends it from there. Only a turn of the ring later does the engine's stream
come back to the same bytes; that is when it waits, on the device, for what was sent from there.

With room for two full batches and a piece, a step never comes to bytes that the step before it is still sending, even
if both are full batches: its copy has had a whole step's time. There is no number of buffers to alternate: steps of one
row take one row, and dozens of them are under way at once before the ring has turned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mii_hcache.runtime.streams import Event, Streams

_ALIGN_BYTES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPart:
    """Bytes of the stage, to be written on the main stream and then sent."""

    memory: torch.Tensor
    """`[num_bytes]`, uint8, device."""
    start: int
    """Bytes that were taken of the stage before it, since there is one."""


class Stage:
    """A ring of device memory between the main stream and a stream of copies to the host. Engine thread only.

    Its memory is its own: no allocator gives it to another stream. Whoever drops what he took without sending it (a
    failed step) need not wait for anything: only the main stream has touched it.
    """

    def __init__(self, *, streams: Streams, device: torch.device, num_bytes: int) -> None:
        self._main = streams.main
        self._copies = streams.new()
        self._memory = torch.empty(_aligned(num_bytes), dtype=torch.uint8, device=device)
        self._head = 0
        self._sent: deque[tuple[int, Event]] = deque()
        """Where parts start that were sent, and when they are on the host; oldest first."""

    @property
    def num_bytes(self) -> int:
        """Of the ring."""
        return self._memory.numel()

    @property
    def room_bytes(self) -> int:
        """The longest part that can be taken without leaving out the end of the ring."""
        return self.num_bytes - self._head % self.num_bytes

    def take(self, num_bytes: int) -> StagedPart:
        """A part for the main stream to write, from now on: the stream waits for the copies out of what lay there. It
        is sent, or dropped, before as much as the ring holds is taken behind it. Does not block."""
        wanted = _aligned(num_bytes)
        if wanted > self.num_bytes:
            raise ValueError(f"{num_bytes} bytes wanted of a stage of {self.num_bytes}")
        if wanted > self.room_bytes:
            self._head += self.room_bytes
        start, self._head = self._head, self._head + wanted
        before: Event | None = None
        while self._sent and self._sent[0][0] < self._head - self.num_bytes:
            _, before = self._sent.popleft()
        if before is not None:  # the copies are made in order: after the last one, all were
            self._main.wait(before)
        at = start % self.num_bytes
        return StagedPart(memory=self._memory[at : at + num_bytes], start=start)

    def take_rows(self, num_layers: int, row_bytes: int) -> list[StagedPart]:
        """Parts for `num_layers` times `row_bytes`, in order: one, or two with the end of the ring between them, so
        that no more than a layer's bytes are left out there."""
        num_here = self.room_bytes // row_bytes
        if not 0 < num_here < num_layers:
            return [self.take(num_layers * row_bytes)]
        parts = [self.take(num_here * row_bytes), self.take((num_layers - num_here) * row_bytes)]
        if self._head - parts[0].start > self.num_bytes:  # the second lies over the first
            raise ValueError(f"{num_layers} times {row_bytes} bytes wanted of a stage of {self.num_bytes}")
        return parts

    def send(self, pairs: Sequence[tuple[torch.Tensor, StagedPart]]) -> Event:
        """Launch copies to the host: `(target, part)`, the target's bytes being as many, contiguous, pinned. They come
        after all that was launched on the main stream so far. Returns the moment when they are done; until then nobody
        touches the targets. Does not block."""
        self._copies.wait(self._main.record())
        for target, part in pairs:
            self._copies.copy(target.view(-1).view(torch.uint8), part.memory)
        done = self._copies.record()
        self._sent.extend((part.start, done) for _, part in pairs)
        return done


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
