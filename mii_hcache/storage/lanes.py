"""Threads that work through a batch side by side."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import wait as wait_for

from mii_hcache.storage.workers import Workers


class Lanes:
    """Runs numbered jobs on a few threads, in order of their numbers, up to the first failure. Thread-safe."""

    def __init__(self, num_threads: int, name: str, *, num_batches: int = 1) -> None:
        """`num_threads` work on a batch; one of them is the caller. `num_batches` are served at a time, others by their
        callers alone."""
        self._num_threads = num_threads
        self._workers = Workers(num_batches * (num_threads - 1), name)

    def run(self, num_jobs: int, job: Callable[[int], str | None]) -> tuple[int, str | None]:
        """Run `job(0)`, `job(1)`, ...: None is success, a word is why it failed. Returns the first failed job's number
        and word, or `(num_jobs, None)`. Jobs after a failed one may or may not run; none runs after the return, nor
        after what a job has raised is raised here: they write into memory that is the caller's.

        Blocks. A single job runs on the calling thread alone.
        """
        batch = _Batch(num_jobs, job)
        others = []
        running = []
        try:
            with contextlib.suppress(RuntimeError):  # closed meanwhile: this thread does it all
                for _ in range(min(self._num_threads, num_jobs) - 1):
                    others.append(self._workers.submit(batch.work))
            batch.work()
        finally:
            running = [other for other in others if not other.cancel()]
            wait_for(running)
        for other in running:
            other.result()
        return batch.stop, batch.reason

    def close(self, timeout_s: float | None = None) -> None:
        """End the threads once they are done; later batches run on the calling thread alone."""
        self._workers.close(timeout_s)


class _Batch:
    def __init__(self, num_jobs: int, job: Callable[[int], str | None]) -> None:
        self.stop = num_jobs
        self.reason: str | None = None
        self._job = job
        self._next = 0
        self._lock = threading.Lock()

    def work(self) -> None:
        while True:
            with self._lock:
                idx = self._next
                if idx >= self.stop:
                    return
                self._next += 1
            failure: str | None = "corrupt"  # if the job raises, nobody may take its bytes for good
            try:
                failure = self._job(idx)
            finally:
                if failure is not None:
                    with self._lock:
                        if idx < self.stop:
                            self.stop, self.reason = idx, failure
