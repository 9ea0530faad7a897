"""Ranks that are forked from a server which has all imported: seconds of imports are paid once, not for every process.

What a rank does is what it does in earnest; only how it is started is not. Servers in `tests/end_to_end` start theirs
as users do. Imported by the fork server before all else: what is imported here is there in every rank.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import transformers.models.llama.modeling_llama
import transformers.models.opt.modeling_opt  # noqa: F401

from mii_hcache.engine import compat, families, modules, ragged_engine  # noqa: F401
from mii_hcache.engine.parallel import follower, rank_process, state  # noqa: F401
from tests import chaos
from tests.forked_process import ForkedProcess

chaos.begin_if_asked()
compat.missing_names()  # imports all that `compat.install` does; that itself starts threads, and forks have none
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__])


class ForkedRank(ForkedProcess):
    """As `Followers` uses `subprocess.Popen`: `python -m mii_hcache.engine.parallel ...`."""

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
            super().__init__(context.Process(target=_be_rank, args=(list(command[3:6]), handed), daemon=True))
        finally:
            os.close(theirs)
        self.stdout = open(ours, "rb")  # noqa: SIM115 whoever reads it closes it


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
