"""A process of multiprocessing's fork server, to be used as one of subprocess's."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import subprocess
import threading
from multiprocessing.context import ForkServerProcess


class ForkedProcess:
    """In the place of `subprocess.Popen`. Any thread."""

    def __init__(self, process: ForkServerProcess) -> None:
        """Starts it."""
        self._process = process
        self._lock = threading.Lock()
        process.start()
        assert process.pid is not None
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with self._lock:  # two threads that ask at once would both read its last word
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        multiprocessing.connection.wait([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
