"""What the host tells the device once per step: many small arrays in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mii_hcache.runtime.streams import Event, Streams, streams_of

RING = 3
"""Steps whose arrays may be on their way at a time. A step's logits are waited for, so one is the rule; tokens that a
restore recomputes are not."""
ALIGNMENT = 16
"""Bytes. Every array begins at a multiple: the address is part of what a Triton kernel is specialised for, and one that
differs from step to step would have it compiled again, in the middle of serving."""


class StepUpload:
    """Sends arrays to the device: one pinned buffer, one copy on the main stream, no waiting for what is computed.

    On a CPU nothing is copied. On a GPU pinned buffers take turns, each with an event behind its copy: the host may run
    steps ahead of the device, and a buffer that is written again too early would hand a step the next one's arrays.
    There is one buffer on the device, overwritten in stream order. Engine thread only.
    """

    def __init__(self, device: torch.device, streams: Streams | None = None) -> None:
        self._device = device
        self._streams = streams
        self._pinned: list[torch.Tensor] = []
        self._sent: list[Event | None] = [None] * RING
        self._turn = 0
        self._on_device = torch.empty(0, dtype=torch.uint8)

    def send(self, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same arrays (host, contiguous, any dtype and shape) on the device, valid until the next `send` and to be
        read on the main stream."""
        if self._device.type == "cpu" and self._streams is None:
            return list(arrays)
        offsets, num_bytes = [], 0
        for array in arrays:
            offsets.append(num_bytes)
            num_bytes += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        host = self._take(num_bytes)
        for array, offset in zip(arrays, offsets, strict=True):
            _view(host, offset, array).copy_(array)
        assert self._streams is not None
        main = self._streams.main
        main.copy(self._on_device[:num_bytes], host[:num_bytes])
        self._sent[self._turn] = main.record()
        return [_view(self._on_device, offset, array) for array, offset in zip(arrays, offsets, strict=True)]

    def _take(self, num_bytes: int) -> torch.Tensor:
        """The next pinned buffer, once its last copy is over; all are made anew when one is too small."""
        if self._streams is None:
            self._streams = streams_of(self._device)
        self._turn = (self._turn + 1) % RING
        if self._on_device.numel() < num_bytes:
            for sent in self._sent:
                if sent is not None:
                    sent.synchronize()
            room = max(1 << 16, 1 << (num_bytes - 1).bit_length())
            is_pinned = self._device.type == "cuda"
            self._pinned = [torch.empty(room, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(RING)]
            self._on_device = torch.empty(room, dtype=torch.uint8, device=self._device)
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        return self._pinned[self._turn]


def _view(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
