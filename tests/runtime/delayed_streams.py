"""Streams on which everything happens late, also what the engine computes: in any order that waits and events allow.

A step's calls only queue work; it is done by and by, a few commands at each further call, and by whoever waits for an
event. So a copy that forgets to wait reads what is not there yet, or what is not there any more.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from mii_hcache.runtime.streams import Event, Stream, Streams


class DelayedEvent(Event):
    def __init__(self, device: DelayedStreams) -> None:
        self._device = device
        self.has_passed = False
        self.at_s = 0.0

    @property
    def passed_s(self) -> float:
        assert self.has_passed
        return self.at_s

    @property
    def is_done(self) -> bool:
        self._device.do_some()
        return self.has_passed

    def pass_by(self) -> None:
        self.has_passed, self.at_s = True, time.perf_counter()

    def synchronize(self) -> None:
        time.sleep(self._device.patience_s)  # in which the engine runs ahead
        while True:
            with self._device.lock:
                if self.has_passed:
                    return
                assert self._device.do_one(), "an event that nothing leads to"


class DelayedStream(Stream):
    def __init__(self, device: DelayedStreams) -> None:
        self._device = device
        self.queue: deque[Callable[[], None] | DelayedEvent] = deque()
        """Work, or an event that must have passed."""

    def _queue(self, command: Callable[[], None] | DelayedEvent) -> None:
        with self._device.lock:
            self.queue.append(command)
        self._device.do_some()

    def launch(self, work: Callable[[], None]) -> None:
        self._queue(work)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape and target.dtype is source.dtype
        self._queue(partial(target.copy_, source))

    def record(self, *, is_timed: bool = False) -> DelayedEvent:
        event = DelayedEvent(self._device)
        self._queue(event.pass_by)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, DelayedEvent)
        self._queue(event)


class DelayedStreams(Streams):
    """Any thread: a lock covers all queues. The same seed and the same calls give the same order."""

    main: DelayedStream
    has_own_memory = True

    def __init__(self, seed: int) -> None:
        self.lock = threading.RLock()
        self._chooser = random.Random(seed)
        self._favours_main = self._chooser.choice((0.0, 0.3, 0.7, 1.0))
        self.patience_s = self._chooser.choice((0.0, 0.001, 0.01))
        self._streams: list[DelayedStream] = []
        self.main = self.new()

    def new(self, *, is_urgent: bool = False) -> DelayedStream:
        self._streams.append(DelayedStream(self))
        return self._streams[-1]

    def do_one(self) -> bool:
        """Do what is next on one of the streams that can go on; False when there is nothing."""
        with self.lock:
            ready = []
            for stream in self._streams:
                while stream.queue and isinstance(stream.queue[0], DelayedEvent) and stream.queue[0].has_passed:
                    stream.queue.popleft()
                if stream.queue and not isinstance(stream.queue[0], DelayedEvent):
                    ready.append(stream)
            if not ready:
                return False
            is_main_next = self.main in ready and self._chooser.random() < self._favours_main
            stream = self.main if is_main_next else self._chooser.choice(ready)
            command = stream.queue.popleft()
            assert not isinstance(command, DelayedEvent)
            command()
            return True

    def do_some(self) -> None:
        """Little most of the time, so that queues grow long; sometimes much."""
        with self.lock:
            for _ in range(self._chooser.choice((0, 0, 1, 1, 2, 30))):
                self.do_one()

    def run_all(self) -> None:
        """Do everything that was launched."""
        while self.do_one():
            pass
        assert not any(stream.queue for stream in self._streams), "a stream waits for ever"
