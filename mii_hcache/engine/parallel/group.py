"""The ranks of one model as one group: sums and gathers of tensors, over gloo on CPUs and NCCL on GPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from mii_hcache.engine.parallel.life import MEETING_FILE
from mii_hcache.errors import RankLostError

TIMEOUT_S = 20.0
"""Longest that a rank waits in a collective for the others: one of them hangs then."""
CLOSE_S = 2.0
"""Longest that closing waits for what a backend has under way."""
_LOOK_S = 0.02


class RankGroup:
    """`size` processes on one machine that hold a share of a model each.

    Every rank makes the same calls in the same order, from one thread at a time; a call blocks until the others make it
    too. On a GPU a call returns when its work is queued on the current stream. Raises RankLostError when a rank is gone
    or does not come within `TIMEOUT_S`; the group is of no use then.

    The NCCL side has not run on GPUs yet.
    """

    beside: RankGroup
    """The same ranks over a communicator of its own, for what is launched beside the forwards: restores gather on it.

    What one communicator is given runs in order, whatever the streams it comes from. Over the one that forwards sum on,
    a gather that waits for its tile's copy would hold up the next forward, and that the gather."""

    def __init__(self, backend: Any, rank: int, size: int, beside: RankGroup | None = None) -> None:
        """`backend`: torch's process group (`join` makes one); None for a group of one. `beside` None: there is no
        other, and this is it."""
        self._backend = backend
        self.rank = rank
        self.size = size
        self.beside = beside or self

    @classmethod
    def join(
        cls,
        directory: Path,
        rank: int,
        size: int,
        device: torch.device,
        *,
        name: str = "engine",
        timeout_s: float = 60,
        check: Callable[[], None] = lambda: None,
    ) -> RankGroup:
        """Meet the other ranks in `directory`, which is this user's alone and on this machine. Blocks until all are
        there; what `check` raises meanwhile, which is called now and then, ends the wait. `name`: groups of other names
        may be used beside this one, from other threads or streams. Raises RankLostError."""
        if size == 1:
            return cls(None, rank, size)
        meeting = torch_dist.FileStore(str(directory / MEETING_FILE), size)
        meeting.set_timeout(timedelta(seconds=timeout_s))
        try:
            _await_all(meeting, name, rank, size, timeout_s, check)  # what backends do cannot be interrupted
            stores = [torch_dist.PrefixStore(one, meeting) for one in (name, f"{name}, beside")]
            backends = [
                _nccl(store, rank, size, device) if device.type == "cuda" else _gloo(store, rank, size)
                for store in stores
            ]
            return cls(backends[0], rank, size, cls(backends[1], rank, size))
        except RuntimeError as error:
            raise RankLostError(f"rank {rank} of {size} did not meet the others: {_first_line(error)}") from error

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; the same bits everywhere. Returns `tensor`, which is contiguous."""
        if self.size > 1:
            backend = self._open_backend()
            try:
                backend.allreduce([tensor]).wait()
            except RuntimeError as error:
                raise self._lost("all_reduce", error) from error
        return tensor

    def all_gather_rows(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """`rows`: `[n, ...]` of this rank, the same shape everywhere; `out`: `[size * n, ...]`, rank by rank. Both
        contiguous and of one dtype; bits stay what they are."""
        if self.size == 1:
            out.copy_(rows)
            return
        backend = self._open_backend()
        try:
            backend._allgather_base(_as_bytes(out), _as_bytes(rows)).wait()
        except RuntimeError as error:
            raise self._lost("all_gather", error) from error

    def least(self, value: int) -> int:
        """The smallest of what the ranks say. Blocks."""
        device = torch.device("cuda", self.rank) if self.is_on_gpu else torch.device("cpu")
        said = torch.empty(self.size, dtype=torch.int64, device=device)
        self.all_gather_rows(said, torch.tensor([value], dtype=torch.int64, device=device))
        return int(said.min())

    @property
    def is_on_gpu(self) -> bool:
        """Whether its tensors are."""
        return self._backend is not None and self._backend.name() == "nccl"

    def abort(self) -> None:
        """End what waits in a collective, on whichever thread, as far as the backend can: NCCL's waits on the device
        end, gloo's when the others' processes do. Any thread. Idempotent."""
        for group in {self, self.beside}:
            backend = group._backend
            if backend is not None:
                backend.abort()

    def close(self) -> None:
        """Let go of the connections, now and not when the interpreter ends, which must not find the threads of a
        backend in a call. Whoever calls afterwards raises RankLostError. Waits for what is under way, for `CLOSE_S` at
        most. Idempotent."""
        backends = []
        for group in {self, self.beside}:
            backends.append(group._backend)
            group._backend = None
        thread = threading.Thread(target=backends.clear, name="hcache-close-group", daemon=True)
        thread.start()
        thread.join(CLOSE_S)

    def _open_backend(self) -> Any:
        if self._backend is None:
            raise RankLostError(f"rank {self.rank} of {self.size} has left the others")
        return self._backend

    def _lost(self, what: str, error: RuntimeError) -> RankLostError:
        return RankLostError(f"rank {self.rank} of {self.size}: {what} failed: {_first_line(error)}")


def _await_all(meeting: Any, name: str, rank: int, size: int, timeout_s: float, check: Callable[[], None]) -> None:
    meeting.set(f"{name}, rank {rank}", "here")
    stop_s = time.monotonic() + timeout_s
    while not meeting.check([f"{name}, rank {other}" for other in range(size)]):
        check()
        if time.monotonic() > stop_s:
            raise RankLostError(f"rank {rank} of {size} did not meet the others within {timeout_s:g} s")
        time.sleep(_LOOK_S)


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = torch_dist.ProcessGroupGloo._Options()
    options._devices = [torch_dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]  # nobody else may connect
    options._timeout = timedelta(seconds=TIMEOUT_S)
    options._threads = 2
    return torch_dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, device: torch.device) -> Any:
    options = torch_dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=TIMEOUT_S)
    backend = torch_dist.ProcessGroupNCCL(store, rank, size, options)
    backend.allreduce([torch.zeros(1, device=device)]).wait()  # NCCL meets at the first collective
    torch.cuda.synchronize(device)
    return backend


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory, flat: backends know fewer dtypes than torch."""
    return tensor.view(-1).view(torch.uint8)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
