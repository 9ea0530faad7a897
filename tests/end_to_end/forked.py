"""Servers that are forked from a process which has imported all: seconds of imports are paid once, not for every start.

What a server does is what it does in earnest; only how it is started is not. Light itself: what is imported beforehand
is in `imported.py`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.forked_process import ForkedProcess

CAN_FORK = not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1")))
"""A process whose imports have looked at a GPU cannot be forked into one that uses it."""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.end_to_end.imported"])


class ForkedServer(ForkedProcess):
    """`python -m mii_hcache.serve ...`."""

    def __init__(self, arguments: Sequence[str], log_path: Path, env: Mapping[str, str]) -> None:
        super().__init__(_context.Process(target=_serve, args=(list(arguments), str(log_path), dict(env)), daemon=True))


def _serve(arguments: list[str], log_path: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.close(log)
    from mii_hcache.serve.__main__ import _leave, main

    _leave(main(arguments))
