"""Processes to be killed: forked from one that has all imported, so that hundreds of deaths take seconds.

The parent writes a job a line, the zygote answers `pid N` and, when that child has ended, `ended STATUS`. A child says
what it does in a file of events, in single appends: what it said survives its death.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HANG_S = 120.0
"""A child that takes longer than this hangs."""


class Hung(AssertionError):
    """A process did not come to an end."""


class Child:
    """A process that runs a job."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid = pid
        self._zygote = zygote

    def kill(self) -> None:
        """As by the kernel out of memory."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def wait(self, timeout_s: float = HANG_S) -> int:
        """Its exit status, negative for a signal. Raises Hung, after killing it."""
        try:
            return int(self._zygote.answer("ended", timeout_s))
        except TimeoutError:
            self.kill()
            self._zygote.answer("ended", HANG_S)
            raise Hung(f"a process did not end within {timeout_s:g} s") from None


class Zygote:
    """Forks a child for each job, one at a time."""

    def __init__(self, preload: Path | None = None) -> None:
        """`preload`: a library for LD_PRELOAD."""
        env = dict(os.environ)
        if preload is not None:
            env["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.zygote"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._unread = b""

    def start(self, job: dict[str, Any]) -> Child:
        """Fork a child for a job."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        return Child(self, int(self.answer("pid", HANG_S)))

    def run(self, job: dict[str, Any], timeout_s: float = HANG_S) -> int:
        """Start and wait."""
        return self.start(job).wait(timeout_s)

    def answer(self, word: str, timeout_s: float) -> str:
        """The next answer. Raises TimeoutError."""
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        fd = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(fd, 4096)
            if not data:
                raise RuntimeError("the zygote died")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        found, _, rest = line.decode().partition(" ")
        assert found == word, line
        return rest

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def main() -> None:
    """The zygote's own life: fork, wait, answer."""
    from tests.crash import job as jobs

    for line in sys.stdin.buffer:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            jobs.run_and_exit(job)
        os.write(1, b"pid %d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(1, b"ended %d\n" % os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
