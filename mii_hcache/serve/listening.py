"""A port of our own before anything slow happens, and an orderly end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from mii_hcache.errors import ConfigError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The last one comes when the terminal is closed, or the connection to it."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused until the server is ready, and no second server
    loads a model for nothing. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"--host {host!r} is no address of this machine: {error.strerror}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise cannot_listen(host, port, error) from error
    return sock


def cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    """Says what to do about it."""
    return ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port or --host")


def url_of(sock: socket.socket) -> str:
    """Where to reach a bound socket; wildcard addresses are reached at the loopback one."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can connect."""
    host: str = sock.getsockname()[0]
    return host == "::1" or host.startswith("127.")


class Server(uvicorn.Server):
    """Serves until the first SIGTERM, SIGINT or SIGHUP, then finishes what runs; the second one does not wait.

    For the main thread. `taking_signals` may reach beyond `run`, around what has to be closed after it.
    """

    def __init__(
        self, app: FastAPI, *, on_started: Callable[[], None], on_stopping: Callable[[], None] = lambda: None
    ) -> None:
        """`on_stopping`: the first signal has come; what runs is finished now."""
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", server_header=False))
        self._app = app
        self._on_started = on_started
        self._on_stopping = on_stopping
        self._is_running = False
        self._num_signals = 0

    @property
    def forced(self) -> bool:
        """A second signal came."""
        return self._num_signals > 1

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Until a signal ends it. Raises ConfigError when somebody else listens on the port by now."""
        self._is_running = True
        try:
            super().run(sockets)
        finally:
            self._is_running = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens; from here on requests are answered."""
        try:
            await super().startup(sockets)
        except OSError as error:
            host, port = (sockets or self.servers[0].sockets)[0].getsockname()[:2]
            raise cannot_listen(host, port, error) from error
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no new requests and lets the running ones end."""
        self._on_stopping()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def taking_signals(self) -> Iterator[None]:
        """Our reaction to signals, for the time of a `with` block. Under `nohup` a SIGHUP stays without one."""
        is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        wanted = [number for number in _SIGNALS if not (is_nohup and number == signal.SIGHUP)]
        before = {number: signal.signal(number, self._on_signal) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own reaction: none. It would raise the signal once more at the end, which is no exit status 0."""
        yield

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._num_signals += 1
        self._app.state.answering.draining = True
        self.should_exit = True
        self.force_exit = self.forced
        if self.forced and (not self._is_running or self._num_signals > 2):
            os._exit(128 + number)  # in the middle of closing: what is on disk is whole at any time
