"""Streams of the device that an engine computes on: what is launched on one runs in order, beside the others.

The seam between the runtime and CUDA. On a CPU everything is done when a call returns. The tests' fake device
(`tests/fake_device.py`) runs launched work later and in any order that streams and events allow, to catch races.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch

from mii_hcache.runtime.gpu_copy import GpuCopies, open_gpu_copies


class Event(ABC):
    """A moment on a stream: everything launched on it before `record`."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether the moment has passed. Does not block."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the calling thread until it has. Any thread."""

    @property
    @abstractmethod
    def passed_s(self) -> float:
        """When it passed, as `time.perf_counter` tells. Only of an event that is done and was recorded as timed."""


class Stream(ABC):
    """One queue of work. Engine thread only."""

    @abstractmethod
    def launch(self, work: Callable[[], None]) -> None:
        """Queue what `work` launches by its torch calls, which go to this stream.

        A GPU's queue takes those calls before this returns, and does them later; the fake device calls `work` itself
        later. So `work` must not be relied on to have run, must look at no result, and must not see names that are
        bound anew afterwards (`functools.partial`, not a closure in a loop). Memory that it touches stays alive and is
        left alone until an event behind it is done: no other stream's allocation may come from what it frees.
        """

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Launch a copy between host and device, or within the device; `target` and `source` of one shape and dtype.
        Host memory is pinned (`buffers.host_empty`); a copy between contiguous tensors is one command. Where memory
        could not be pinned a copy is as right, and holds up the calling thread until it is over."""

    def copy_many(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """`copy` of each `(target, source)`, in any order: no target is touched twice."""
        for target, source in pairs:
            self.copy(target, source)

    def copy_joined(self, target: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
        """`copy` of the pieces, rows of `target`'s shape and dtype one after the other, into `target`; all are
        contiguous."""
        self.copy_many(zip(target.split([len(piece) for piece in pieces]), pieces, strict=True))  # type: ignore[no-untyped-call]

    @abstractmethod
    def record(self, *, is_timed: bool = False) -> Event:
        """The moment after everything launched so far. `is_timed`: `Event.passed_s` will be asked for."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """What is launched from now on runs after `event`. Does not block the thread."""


class Streams(ABC):
    """A device's streams. Engine thread only."""

    main: Stream
    """The one that the engine's own calls go to: forwards, captures, reads from blocks."""
    has_own_memory: bool
    """Whether the device computes on memory of its own, that state must be copied to."""

    @abstractmethod
    def new(self, *, is_urgent: bool = False) -> Stream:
        """Another stream; `is_urgent` asks that its work comes first where both could run."""


class _Now(Event):
    """A moment that has passed."""

    is_done = True
    passed_s = 0.0

    def __init__(self) -> None:
        self.passed_s = time.perf_counter()

    def synchronize(self) -> None:
        pass


class HostStream(Stream):
    """The CPU's: a call is over when it returns."""

    def launch(self, work: Callable[[], None]) -> None:
        work()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def record(self, *, is_timed: bool = False) -> Event:
        return _Now()

    def wait(self, event: Event) -> None:
        event.synchronize()


class HostStreams(Streams):
    """For an engine on the CPU."""

    has_own_memory = False

    def __init__(self) -> None:
        self.main = HostStream()

    def new(self, *, is_urgent: bool = False) -> Stream:
        return HostStream()


class _CudaClock:
    """Moments of one GPU on the host's clock."""

    _FRESH_S = 10.0
    """Then it is set anew: the two clocks drift apart, and CUDA tells of distances in float32 milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._set()

    def _set(self) -> None:
        """Waits for a stream that is empty: some 20 microseconds, whatever the others do."""
        self._zero = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._zero.record(self._stream)
        self._zero.synchronize()
        self._zero_s = time.perf_counter()

    @property
    def zero(self) -> tuple[torch.cuda.Event, float]:
        """A moment that has passed, and when that was."""
        if time.perf_counter() - self._zero_s > self._FRESH_S:
            self._set()
        return self._zero, self._zero_s


class _CudaEvent(Event):
    def __init__(self, event: torch.cuda.Event, zero: tuple[torch.cuda.Event, float] | None = None) -> None:
        self.event = event
        self._zero = zero

    @property
    def is_done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        self.event.synchronize()

    @property
    def passed_s(self) -> float:
        assert self._zero is not None, "this event was not recorded as timed"
        zero, zero_s = self._zero
        return zero_s + 1e-3 * float(zero.elapsed_time(self.event))


class CudaStream(Stream):
    """A stream of a GPU. `stream` None: whichever is current on the calling thread. Not run on hardware yet."""

    def __init__(self, streams: CudaStreams, stream: torch.cuda.Stream | None) -> None:
        self._streams = streams
        self._own = stream

    @property
    def stream(self) -> torch.cuda.Stream:
        """torch's."""
        return torch.cuda.current_stream(self._streams.device) if self._own is None else self._own

    def launch(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._own is None:  # current already: a step makes a call for each of its layers
            target.copy_(source, non_blocking=True)
            return
        with torch.cuda.stream(self._own):
            target.copy_(source, non_blocking=True)

    def copy_many(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        stream, copies = self.stream, self._streams.copies
        with torch.cuda.stream(stream):
            for target, source in copies.copy(pairs, stream.cuda_stream) if copies is not None else pairs:
                target.copy_(source, non_blocking=True)

    def copy_joined(self, target: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
        stream, copies = self.stream, self._streams.copies
        if copies is None or not copies.copy_joined(target, pieces, stream.cuda_stream):
            super().copy_joined(target, pieces)

    def record(self, *, is_timed: bool = False) -> Event:
        zero = self._streams.clock.zero if is_timed else None
        # A thread that waits for it sleeps, and does not spin on a core that others need.
        event = torch.cuda.Event(enable_timing=is_timed, blocking=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return _CudaEvent(event, zero)

    def wait(self, event: Event) -> None:
        if isinstance(event, _CudaEvent):
            self.stream.wait_event(event.event)
        else:
            event.synchronize()


class CudaStreams(Streams):
    """For an engine on a GPU. Its streams do not block each other, nor wait for the legacy default stream's turns."""

    has_own_memory = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.main = CudaStream(self, None)
        self._clock: _CudaClock | None = None
        self._copies: GpuCopies | None = None
        self._has_copies: bool | None = None

    def new(self, *, is_urgent: bool = False) -> Stream:
        stream = torch.cuda.Stream(self.device, priority=-1 if is_urgent else 0)  # type: ignore[no-untyped-call]
        return CudaStream(self, stream)

    @property
    def clock(self) -> _CudaClock:
        """Of the device; made on first use."""
        if self._clock is None:
            self._clock = _CudaClock(self.device)
        return self._clock

    @property
    def copies(self) -> GpuCopies | None:
        """Copies in batches, None where the native engine cannot make them; opened on first use."""
        if self._has_copies is None:
            self._copies = open_gpu_copies(self.device)
            self._has_copies = self._copies is not None
        return self._copies


def streams_of(device: torch.device) -> Streams:
    """The streams of an engine's device."""
    return HostStreams() if device.type == "cpu" else CudaStreams(device)
