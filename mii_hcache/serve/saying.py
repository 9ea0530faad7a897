"""Words for whoever started the server, and may be gone by now."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TextIO

_NOBODY_LISTENS = (errno.EPIPE, errno.EIO)
"""A pipe whose reader ended, a terminal that was closed."""


def say(words: str, stream: TextIO, end: str = "\n") -> None:
    """Write, and flush. Never raises: Ctrl-C in `serve.sh | tee log` ends tee first, and what is still to be saved must
    not be lost because nobody reads that it will be. A stream that nobody reads leads nowhere from then on."""
    try:
        stream.write(words + end)
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: it is closed
        if isinstance(error, OSError) and error.errno in _NOBODY_LISTENS:
            _lead_nowhere(stream)


def _lead_nowhere(stream: TextIO) -> None:
    """What is still in its buffer would be tried again when the interpreter ends, and change the exit status."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
