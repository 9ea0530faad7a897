"""Threads that may hang without anybody hanging with them."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Any, TypeVar

_T = TypeVar("_T")


class StalledError(OSError):
    """A call did not end in time. It goes on, on a thread that nobody waits for."""

    def __init__(self) -> None:
        super().__init__(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


class Workers:
    """A pool of daemon threads, made when they are needed. Thread-safe.

    Unlike ThreadPoolExecutor it can do without a thread that hangs in the kernel: another takes its place, and neither
    `close` nor the end of the interpreter waits for it.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        """At most `max_threads` work at a time, not counting those that were replaced."""
        self._max_threads = max(1, max_threads)
        self._name = name
        self._changed = threading.Condition()
        """Guards what follows."""
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running: set[Future[Any]] = set()
        self._replaced: set[Future[Any]] = set()
        self._num_threads = self._num_idle = self._num_made = 0
        self._is_closed = False

    def submit(self, job: Callable[[], _T]) -> Future[_T]:
        """Run in the background, in order of submission. Raises RuntimeError when closed."""
        future: Future[_T] = Future()
        with self._changed:
            if self._is_closed:
                raise RuntimeError(f"{self._name}: closed")
            self._jobs.append((future, job))
            self._staff()
        return future

    def call(self, job: Callable[[], _T], timeout_s: float) -> _T:
        """Run and wait, but no longer than `timeout_s`. Raises StalledError then, else what the job raises. A job that
        did not end in time either never runs, or goes on without anybody waiting for it."""
        future = self.submit(job)
        wait_for([future], timeout_s)
        if not future.done() and not future.cancel():
            self.replace(future)
        if not future.done() or future.cancelled():
            raise StalledError
        return future.result()

    def replace(self, future: Future[Any]) -> None:
        """Let another thread take the place of the one that runs this. What is not running is ignored."""
        with self._changed:
            if future in self._running and future not in self._replaced:
                self._replaced.add(future)
                self._num_threads -= 1
                self._staff()
                self._changed.notify_all()

    def close(self, timeout_s: float | None = None) -> bool:
        """Run what was submitted, end the threads. Whether that was done within `timeout_s`; if not, what has not begun
        is cancelled. Does not wait for threads that were replaced. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            has_ended = self._changed.wait_for(lambda: not self._num_threads, timeout_s)
            left, self._jobs = self._jobs, deque()
        for future, _ in left:
            future.cancel()
        return has_ended

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def _staff(self) -> None:
        """See to it that somebody takes up the jobs. Lock held."""
        if self._num_idle < len(self._jobs) and self._num_threads < self._max_threads:
            self._num_threads += 1
            self._num_made += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._num_made}", daemon=True).start()
        self._changed.notify_all()

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        with self._changed:
            self._num_idle += 1
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            self._num_idle -= 1
            if not self._jobs:
                self._num_threads -= 1
                self._changed.notify_all()
                return False
            future, job = self._jobs.popleft()
            if not future.set_running_or_notify_cancel():
                return True
            self._running.add(future)
        try:
            result = job()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        with self._changed:
            self._running.discard(future)
            if future in self._replaced:
                self._replaced.discard(future)
                return False
        return True
