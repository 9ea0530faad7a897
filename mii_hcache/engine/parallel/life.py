"""The line between a rank and rank 0 that says that both are there, and what a rank has to say."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

BEAT_S = 1.0
EXIT_ORPHANED = 3
"""Rank 0 is gone."""
MEETING_FILE = "meeting"
"""All that there is in the folder where the ranks meet."""


class Life:
    """The line to rank 0 on which a follower says how it is, and by whose end it learns that rank 0 is gone."""

    def __init__(self, link: Connection, meeting: Path) -> None:
        """`meeting`: where the ranks met; rank 0's to remove, as long as it is there."""
        self._link = link
        self._meeting = meeting
        self._lock = threading.Lock()
        self._parent = os.getppid()
        threading.Thread(target=self._beat, name="hcache-life", daemon=True).start()

    def say(self, kind: str, words: Any) -> None:
        """Any thread. Ends the process when rank 0 is gone."""
        try:
            with self._lock:
                self._link.send((kind, words))
        except OSError:
            self.end_orphaned()

    def end_orphaned(self) -> NoReturn:
        """Rank 0 is gone: end the process, and leave nothing behind. Any thread."""
        with contextlib.suppress(OSError):  # another rank was first; or it is no such folder, and then it stays
            (self._meeting / MEETING_FILE).unlink(missing_ok=True)
            self._meeting.rmdir()
        os._exit(EXIT_ORPHANED)

    def _beat(self) -> None:
        """Nobody says anything on this line but its end."""
        while True:
            try:
                if self._link.poll(BEAT_S):
                    self._link.recv_bytes()
            except (EOFError, OSError):
                self.end_orphaned()
            if os.getppid() != self._parent:  # a child of rank 0's may have inherited the other end
                self.end_orphaned()
            self.say("beat", None)


class Relay(logging.Handler):
    """Warnings of this process reach rank 0's log."""

    def __init__(self, life: Life) -> None:
        super().__init__(logging.WARNING)
        self._life = life

    def emit(self, record: logging.LogRecord) -> None:
        self._life.say("log", (record.levelno, record.name, self.format(record)))
