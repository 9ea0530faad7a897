"""A device made of CPU tensors whose side streams run late and out of order, and who tells when two forget to wait.

Races on a GPU seldom show. Here they do, in two ways:

- What is launched on a side stream really happens later, at a random moment that streams and events allow, while the
  main stream (the engine's own torch calls) and host threads go on: who does not wait reads old bytes, or poison.
- Every access to watched memory is compared with those before it, by vector clocks: two that touch the same bytes, one
  of them writing, and that no launch, event or handing over puts in order, raise `RaceError`, which names both. So a
  race is told even when the bytes happened to come in time.

The main stream runs at once, which a GPU's does not; but its clock is not the host's. A side stream that forgets to
wait for it is told of, although its bytes were always there.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mii_hcache.runtime.streams import Event, Stream, Streams
from tests.races import Actor, Checker


class _Watch(TorchDispatchMode):
    """Notes what every torch operation on this thread reads and writes."""

    def __init__(self, streams: FakeStreams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view:
            self._note(func, args, kwargs)
            self._streams.maybe_run()
        result = func(*args, **kwargs)
        if self._streams.allocating is not None and func._schema.name == "aten::empty":
            self._streams.checker.watch(result, self._streams.allocating, self._streams.enter_actor())
        return result

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func._schema.name
        is_indexed = name in ("aten::index", "aten::index_put_", "aten::index_put")
        overwrites = name in ("aten::copy_", "aten::fill_", "aten::index_put_", "aten::zero_")
        for idx, argument in enumerate(func._schema.arguments):
            value = args[idx] if idx < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                    self._access(tensor, writes, overwrites, name, args[1] if is_indexed and idx == 0 else None)

    def _access(self, tensor: torch.Tensor, writes: bool, overwrites: bool, name: str, indices: Any) -> None:
        note = partial(self._streams.checker.note, tensor, label=name, indices=indices)
        actor = self._streams.enter_actor()
        if not (writes and overwrites):
            note(writes=False, actor=actor)
        if writes:
            note(writes=True, actor=actor)


class FakeEvent(Event):
    """A moment on a fake stream."""

    def __init__(self, streams: FakeStreams) -> None:
        self._streams = streams
        self.clock: np.ndarray | None = None
        """What was done by then; None: it has not passed."""
        self._passed_s = 0.0

    def pass_(self, clock: np.ndarray) -> None:
        """Now."""
        self.clock = clock
        self._passed_s = time.perf_counter()

    @property
    def is_done(self) -> bool:
        if self._streams.is_ignored(sys._getframe(1)):
            return True
        with self._streams.lock:
            self._streams.maybe_run()
            if self.clock is not None:
                self._streams.checker.acquire(self.clock)
            return self.clock is not None

    def synchronize(self) -> None:
        if self._streams.is_ignored(sys._getframe(1)):
            return
        self._streams.run_until(self)
        assert self.clock is not None
        self._streams.checker.acquire(self.clock)

    @property
    def passed_s(self) -> float:
        assert self.clock is not None, "asked before it passed"
        return self._passed_s


class FakeStream(Stream):
    """A side stream: what it is given is done later."""

    def __init__(self, streams: FakeStreams, name: str) -> None:
        self._streams = streams
        self.actor = streams.checker.actor(name)
        self.queue: deque[tuple[str, Any, np.ndarray | None]] = deque()

    def _put(self, kind: str, what: Any) -> None:
        with self._streams.lock:
            self.queue.append((kind, what, self._streams.checker.release()))
            self._streams.maybe_run()

    def launch(self, work: Callable[[], None]) -> None:
        self._put("work", work)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape and target.dtype is source.dtype
        self._put("work", partial(target.copy_, source))

    def record(self, *, is_timed: bool = False) -> Event:
        event = FakeEvent(self._streams)
        self._put("record", event)
        return event

    def wait(self, event: Event) -> None:
        if not self._streams.is_ignored(sys._getframe(1), self.actor.name):
            self._put("wait", event)

    def is_stuck(self) -> bool:
        """Whether it has nothing that could be done now."""
        if not self.queue:
            return True
        kind, what, _ = self.queue[0]
        if kind == "work":
            return not getattr(getattr(what, "func", None), "can_run", True)
        return kind == "wait" and what.clock is None

    def run_one(self) -> None:
        """Do what comes first."""
        kind, what, launched = self.queue.popleft()
        checker = self._streams.checker
        assert launched is not None
        checker.acquire(launched, self.actor)
        if kind == "wait":
            checker.acquire(what.clock, self.actor)
        elif kind == "record":
            what.pass_(checker.release(self.actor))
        else:
            with self._streams.acting_as(self.actor), torch.inference_mode(), self._streams.watching():
                what()


class FakeMain(Stream):
    """The engine's own calls: they run at once, on a clock of their own."""

    def __init__(self, streams: FakeStreams) -> None:
        self._streams = streams
        self.actor = streams.checker.actor("the main stream")

    def launch(self, work: Callable[[], None]) -> None:
        work()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def record(self, *, is_timed: bool = False) -> Event:
        event = FakeEvent(self._streams)
        self._streams.checker.acquire(self._streams.checker.release(), self.actor)
        event.pass_(self._streams.checker.release(self.actor))
        return event

    def wait(self, event: Event) -> None:
        if self._streams.is_ignored(sys._getframe(1)):
            return
        assert isinstance(event, FakeEvent)
        self._streams.run_until(event)
        assert event.clock is not None
        self._streams.checker.acquire(event.clock, self.actor)


class _Acting:
    def __init__(self, streams: FakeStreams, actor: Actor) -> None:
        self._streams, self._actor = streams, actor

    def __enter__(self) -> None:
        self._streams.acting.append(self._actor)

    def __exit__(self, *exc_info: object) -> None:
        self._streams.acting.pop()


class FakeStreams(Streams):
    """A device over CPU tensors. Torch calls are noted on threads that are within `watching()`."""

    has_own_memory = True

    def __init__(
        self, seed: int = 0, *, ignored: tuple[str, int, str] | None = None, haste: float = 0.1, granule_bytes: int = 16
    ) -> None:
        """`ignored`: file name, line and stream (empty: any) of a wait that is left out, to see whether anybody
        notices. `haste`: how likely a side stream goes on at any moment. `granule_bytes`: as in `Checker`."""
        self.checker = Checker(granule_bytes)
        self.lock = threading.RLock()
        self._chooser = random.Random(seed)
        self.haste = haste
        self._ignored = ignored
        self.num_ignored = 0
        self._acting = threading.local()
        self._is_running = False
        self.allocating: str | None = None
        """What tensors that are allocated now are watched as; None: they are not watched."""
        self.main = FakeMain(self)
        self.side: list[FakeStream] = []

    def new(self, *, is_urgent: bool = False) -> Stream:
        stream = FakeStream(self, f"side stream {len(self.side)}")
        self.side.append(stream)
        return stream

    def watching(self) -> TorchDispatchMode:
        """A context in which this thread's torch calls are those of the device."""
        return _Watch(self)

    def is_ignored(self, frame: Any, stream: str = "") -> bool:
        """Whether the wait in that line, on that stream, is the one that is left out."""
        if self._ignored is None:
            return False
        name, line, only = self._ignored
        is_it = frame.f_code.co_filename.endswith(name) and frame.f_lineno == line and stream.startswith(only)
        self.num_ignored += is_it
        return is_it

    # --- who acts -----------------------------------------------------------------------------------------------

    @property
    def acting(self) -> list[Actor]:
        """Side streams whose work this thread does now, the innermost last."""
        if not hasattr(self._acting, "actors"):
            self._acting.actors = []
        return self._acting.actors  # type: ignore[no-any-return]

    def acting_as(self, actor: Actor) -> _Acting:
        """This thread does a stream's work, for a `with` block."""
        return _Acting(self, actor)

    def enter_actor(self) -> Actor:
        """Whose a torch call on this thread is; it comes after what this thread did and knows."""
        if self.acting:
            return self.acting[-1]
        self.checker.acquire(self.checker.release(), self.main.actor)
        return self.main.actor

    # --- when ---------------------------------------------------------------------------------------------------

    def maybe_run(self) -> None:
        """A moment passes: some side stream may go on."""
        with self.lock:
            if self._is_running:
                return
            while self.side and self._chooser.random() < self.haste:
                self._run_any()

    def run_until(self, event: FakeEvent) -> None:
        """Let side streams go on until the event has passed."""
        with self.lock:
            while event.clock is None:
                assert self._run_any(), "an event that never passes: streams wait for each other"

    def run_all(self) -> None:
        """Let side streams do all they have."""
        with self.lock:
            while self._run_any():
                pass
            assert not any(stream.queue for stream in self.side)

    def _run_any(self) -> bool:
        streams = [stream for stream in self.side if not stream.is_stuck()]
        if not streams:
            return False
        self._is_running = True
        try:
            self._chooser.choice(streams).run_one()
        finally:
            self._is_running = False
        return True
