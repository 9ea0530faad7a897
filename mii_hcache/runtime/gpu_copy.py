"""Many copies from host memory to a GPU by few calls: a restore's K and V go to hundreds of runs of blocks.

`csrc/gpu/copies.hpp`, by the CUDA driver and beside torch, on torch's streams. **Never run on a GPU.**
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from mii_hcache.runtime.lent_rows import LentRows
from mii_hcache.storage.native import new_gpu, why_no_gpu

if TYPE_CHECKING:
    from mii_hcache import _io

_log = logging.getLogger(__name__)

Pair = tuple[torch.Tensor, torch.Tensor]
"""Target and source of a copy, of one shape and dtype."""


class GpuCopies:
    """Copies to one GPU. Any thread; a call blocks, without the interpreter's lock, only while the stream's queue is
    full (about a thousand copies or batches of them)."""

    def __init__(self, device: torch.device) -> None:
        """`device`: with its index. Takes the GPU's primary context, which is torch's. Raises OSError. Only where
        `why_no_gpu` is None."""
        if device.index is None:
            raise ValueError(f"which GPU is {device}?")
        self.device = device
        self._gpu: _io.Gpu = new_gpu(device.index)

    @property
    def how(self) -> str:
        """In batches or one by one, for people."""
        return self._gpu.how_copies_go()

    def copy(self, pairs: Iterable[Pair], stream: int) -> list[Pair]:
        """Queue on `stream` (`torch.cuda.Stream.cuda_stream`) the pairs that are contiguous on both sides, from the
        host to this GPU, in no order among themselves: no target is touched twice. Returns the others, which are left
        to torch. Neighbours on both sides become one copy.

        Sources are read when the stream has come to them; both sides stay alive and as they are until an event behind
        them. From memory that is not pinned the driver copies at once, and slowly. Raises ValueError, and copies
        nothing, for a pair of two shapes or dtypes; OSError when the driver refuses, and then some may be queued.
        """
        wanted, others = [], []
        for target, source in pairs:
            if target.shape != source.shape or target.dtype != source.dtype:
                raise ValueError(
                    f"{tuple(source.shape)} of {source.dtype} are no {tuple(target.shape)} of {target.dtype}"
                )
            is_ours = target.device == self.device and source.device.type == "cpu"
            if is_ours and target.is_contiguous() and source.is_contiguous():
                wanted.append((target.data_ptr(), source.data_ptr(), source.nbytes))
            else:
                others.append((target, source))
        if wanted:
            self._gpu.copy_in_many(wanted, stream)
        return others

    def copy_joined(self, target: torch.Tensor, pieces: Sequence[torch.Tensor], stream: int) -> bool:
        """`copy` of pieces, which follow each other in `target`: contiguous, from the host, of its dtype. False, and
        nothing is queued, where they are not, or the target is not this GPU's. A tile of a restore is dozens of pieces,
        and the engine's thread has a few hundred microseconds for it: so they are looked at as little as may be.

        Raises ValueError for pieces that are not as long as `target`; OSError as `copy`."""
        if target.device != self.device or not target.is_contiguous():
            return False
        wanted: list[tuple[int, int, int]] = []
        at, dtype = target.data_ptr(), target.dtype
        stop = at + target.nbytes
        if isinstance(pieces, LentRows):
            if pieces.dtype != dtype:
                return False
            size = pieces.piece_bytes
            wanted = [(at + idx * size, address, size) for idx, address in enumerate(pieces.addresses)]
            at += pieces.nbytes
        else:
            for piece in pieces:
                if piece.dtype != dtype or not piece.is_cpu or not piece.is_contiguous():
                    return False
                num_bytes = piece.nbytes
                wanted.append((at, piece.data_ptr(), num_bytes))
                at += num_bytes
        if at != stop:
            raise ValueError(f"pieces do not fill {tuple(target.shape)} of {dtype}: {stop - at} bytes are left")
        self._gpu.copy_in_many(wanted, stream)
        return True

    def pin(self, memory: memoryview) -> None:
        """Page-lock host memory for every GPU, until `unpin`; whole pages are best a multiple of 2 MiB. Raises OSError:
        above the limit of locked memory, or pinned already."""
        self._gpu.pin(memory)

    def unpin(self, memory: memoryview) -> None:
        """What `pin` was given, before it goes and once no copy of it is under way. Raises OSError."""
        self._gpu.unpin(memory)

    def close(self) -> None:
        """Give the context back; what is queued still runs."""
        self._gpu.close()


def open_gpu_copies(device: torch.device) -> GpuCopies | None:
    """Copies to `device`; None where it is no GPU, or where the native engine cannot reach it, which the log tells."""
    if device.type != "cuda":
        return None
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    why_not = why_no_gpu()
    if why_not is None:
        try:
            copies = GpuCopies(device)
        except OSError as error:
            why_not = str(error.strerror)
        else:
            _log.info("copies to %s go %s", device, copies.how)
            return copies
    _log.info("copies to %s go through torch, one by one: %s", device, why_not)
    return None
