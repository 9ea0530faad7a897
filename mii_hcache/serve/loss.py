"""A rank of a model over several is gone: the server ends, soon, whatever hangs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from mii_hcache.errors import RankLostError
from mii_hcache.serve.listening import Server

END_S = 7.0
"""Longest that an orderly end may take: running answers have failed already, what was saved is made durable."""
FORCE_S = 4.0
"""Connections that are still open then are closed; requests have long been told (`EngineService.lose`)."""


class Loss:
    """What happens then. `note` may be called from any thread; the rest is the main thread's."""

    def __init__(self, complain: Callable[[str], None], exit_status: int) -> None:
        """`complain` tells the operator. `exit_status`: of a process that does not end by itself in time."""
        self._exit_status = exit_status
        self.error: RankLostError | None = None
        self._server: Server | None = None
        self._complain = complain
        self._lock = threading.Lock()
        self._is_told = False

    def note(self, error: RankLostError) -> None:
        """The engine is lost; its requests are being told. Let the server end, and see to it that it does."""
        self.error = error
        _in(END_S, self._end_now)
        _in(FORCE_S, self._close_connections)
        if self._server is not None:
            self._server.should_exit = True

    def take(self, server: Server) -> None:
        """The server that is to end, before it runs. If a rank was lost since the engine was opened, it does at
        once."""
        self._server = server
        if self.error is not None:
            server.should_exit = True

    def tell(self, error: RankLostError) -> None:
        """The operator, once; when everything is closed."""
        with self._lock:
            self._tell_once(error)

    def _close_connections(self) -> None:
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True

    def _end_now(self) -> None:
        """Loading, or closing, hangs: what is on disk is whole at any time."""
        assert self.error is not None
        with self._lock:
            self._tell_once(self.error)
            os._exit(self._exit_status)

    def _tell_once(self, error: RankLostError) -> None:
        if not self._is_told:
            self._is_told = True
            self._complain(f"{error}. The model is incomplete, so the server ends; start it again")


def _in(seconds: float, then: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, then)
    timer.daemon = True
    timer.start()
