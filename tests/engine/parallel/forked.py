"""Ranks that are forked from a server which has all imported: seconds of imports are paid once, not for every process.

What a rank does is what it does in earnest; only how it is started is not. Servers in `tests/end_to_end` start theirs
as users do. Imported by the fork server before all else: what is imported here is there in every rank.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import transformers.models.llama.modeling_llama
import transformers.models.opt.modeling_opt  # noqa: F401

from mii_hcache.engine import compat, families, modules, ragged_engine  # noqa: F401
from mii_hcache.engine.parallel import follower, rank_process, state  # noqa: F401
from tests import chaos

chaos.begin_if_asked()
compat.missing_names()  # imports all that `compat.install` does; that itself starts threads, and forks have none
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__])


class ForkedRank:
    """In the place of `subprocess.Popen`, as `Followers` uses it: `python -m mii_hcache.engine.parallel ...`."""

    def __init__(
        self, command: Sequence[str], *, pass_fds: Sequence[int], env: dict[str, str], **settings: Any
    ) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "mii_hcache.engine.parallel"]
        assert settings.pop("stdout") == subprocess.PIPE and settings.pop("stderr") == subprocess.STDOUT
        assert settings == {"stdin": subprocess.DEVNULL, "start_new_session": True}
        assert [int(fd) for fd in command[6:]] == list(pass_fds)
        ours, theirs = os.pipe()
        try:
            handed = [_Handed(fd) for fd in (*pass_fds, theirs)]
            self._process = context.Process(target=_be_rank, args=(list(command[3:6]), handed), daemon=True)
            self._process.start()
        finally:
            os.close(theirs)
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.stdout = open(ours, "rb")  # noqa: SIM115 whoever reads it closes it
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        multiprocessing.connection.wait([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a forked rank", timeout or 0.0)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class _Handed:
    """A file descriptor that a process is to have: there it is the number that it has there."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, (DupFd(self._fd),)


def _take(handed: Any) -> int:
    return int(handed.detach())


def _be_rank(own: list[str], handed: list[int]) -> None:
    *sockets, output = handed
    os.setsid()
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    os._exit(rank_process.main([*own, *(str(fd) for fd in sockets)]))
