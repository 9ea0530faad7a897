"""Real servers in processes of their own, on loopback, and conversations over HTTP."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

WORDS = [
    "water",
    "stone",
    "light",
    "seven",
    "turn",
    "the",
    "a",
    "of",
    "remember",
    "quickly",
    "machine",
    "winter,",
    "river!",
    "(answer)",
    "naïve",
    "水",
    "🙂",
]


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`python -m mii_hcache.serve` with the demo model. Freed blocks are poisoned with NaN."""

    def __init__(self, root: Path, *arguments: str, name: str = "state") -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = root / f"{name}-{self.port}.log"
        self._log = self.log_path.open("w")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mii_hcache.serve", "--port", str(self.port)),
                *("--state-dir", str(root / name), *arguments),
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MII_HCACHE_POISON_BLOCKS": "1"},
        )
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def wait_until_ready(self) -> Server:
        """Returns once `/health` says ok; fails with the log when the process ends before."""
        deadline_s = time.monotonic() + 180  # several processes may start on a busy machine
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended ({self.process.returncode}):\n{self.log_path.read_text()}")
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/health").status_code == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError(f"not ready in time:\n{self.log_path.read_text()}")

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self._close()
        return code

    def kill(self) -> None:
        """SIGKILL."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        self.http.close()
        self._log.close()

    def metrics(self) -> dict[str, float]:
        """Numbers of `/metrics` without labels."""
        values = {}
        for line in self.http.get("/metrics").text.splitlines():
            if line and not line.startswith("#") and "{" not in line:
                name, _, value = line.partition(" ")
                values[name] = float(value)
        return values


@contextlib.contextmanager
def serving(root: Path, *arguments: str, name: str = "state") -> Iterator[Server]:
    """A server that is stopped at the end, and must then exit with 0."""
    server = Server(root, *arguments, name=name)
    try:
        yield server.wait_until_ready()
        assert server.stop() == 0, server.log_path.read_text()
    finally:
        if server.process.poll() is None:
            server.kill()


@contextlib.contextmanager
def doomed(root: Path, *arguments: str) -> Iterator[Server]:
    """A server that is killed at the end, or before."""
    server = Server(root, *arguments)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


@dataclass
class Chat:
    """One conversation as a client sees it: messages, nothing else. The client's words are seeded."""

    seed: int
    num_words: int = 40
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def next_body(self, max_tokens: int) -> dict[str, Any]:
        """The request of the next turn."""
        chooser = random.Random(f"{self.seed}/{len(self.answers)}")
        said = " ".join(chooser.choices(WORDS, k=self.num_words + 7 * len(self.answers)))
        messages = [*self.messages, {"role": "user", "content": said}]
        return {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}

    def turn(self, server: Server, max_tokens: int = 50) -> dict[str, Any]:
        """Ask, and make the answer history. Raises httpx.HTTPError when the server goes away."""
        body = self.next_body(max_tokens)
        response = server.http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer = response.json()
        self.messages = [*body["messages"], {"role": "assistant", "content": text_of(answer)}]
        self.answers.append(answer)
        return answer


def text_of(answer: dict[str, Any]) -> str:
    """What the assistant said."""
    return str(answer["choices"][0]["message"]["content"])


def restorable(answer: dict[str, Any]) -> int:
    """Tokens that the turn after this answer can restore: the last generated token was never run."""
    usage = answer["usage"]
    return 64 * ((usage["prompt_tokens"] + usage["completion_tokens"] - 1) // 64)


def interleave(server: Server, chats: list[Chat], num_turns: int) -> None:
    """All chats at once, each turn by turn."""
    errors: list[BaseException] = []

    def talk(chat: Chat) -> None:
        try:
            for _ in range(num_turns):
                chat.turn(server, 30 + 11 * (chat.seed % 5))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=talk, args=(chat,)) for chat in chats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
