"""Real servers in processes of their own, on loopback, and conversations over HTTP."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.identity import next_span_id, pack_tokens
from mii_hcache.tools.state_view import look_at
from tests.end_to_end.forked import CAN_FORK, ForkedServer

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


class Server:
    """`python -m mii_hcache.serve` with the demo model. Freed blocks are poisoned with NaN."""

    _numbers = itertools.count()

    def __init__(self, root: Path, *arguments: str, name: str = "state", is_forked: bool = True) -> None:
        """`is_forked`: started by `forked.ForkedServer` where that can be, else as users do."""
        self.state_dir = root / name
        self.log_path = root / f"{name}-{next(self._numbers)}.log"
        self.http = httpx.Client(timeout=120)
        self.process: ForkedServer | subprocess.Popen[bytes]
        given = ["--port", "0", "--state-dir", str(self.state_dir), *arguments]
        own = {"OMP_NUM_THREADS": "1", "MII_HCACHE_POISON_BLOCKS": "1"}
        self.log_path.touch()
        if is_forked and CAN_FORK:
            self.process = ForkedServer(given, self.log_path, own)
            return
        command = [sys.executable, "-m", "mii_hcache.serve", *given]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **own})

    @property
    def url(self) -> str:
        """Where it listens: the port is its own choice."""
        return str(self.http.base_url).rstrip("/")

    def wait_until_ready(self) -> Server:
        """Returns once `/health` says ok; fails with the log when the process ends before."""
        deadline_s = time.monotonic() + 180  # several processes may start on a busy machine
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended ({self.process.returncode}):\n{self.log_path.read_text()}")
            if found := re.search(r"address  (http://\S+)\s", self.log_path.read_text()):
                self.http.base_url = found[1]
                if self.http.get("/health").status_code == 200:
                    return self
            time.sleep(0.02)
        raise AssertionError(f"not ready in time:\n{self.log_path.read_text()}")

    def stop(self) -> int:
        """SIGTERM; the exit code. For when nobody reads from it any more."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=120)
        self.http.close()
        return code

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()
        self.http.close()

    def metrics(self) -> dict[str, float]:
        """As `values_of`."""
        return values_of(self.http.get("/metrics").text)


def values_of(metrics: str) -> dict[str, float]:
    """Numbers of `/metrics` that have no labels, by their names without our prefix."""
    pairs = (line.split(" ", 1) for line in metrics.splitlines() if not line.startswith("#") and "{" not in line)
    return {name.removeprefix("mii_hcache_"): float(value) for name, value in pairs}


@contextlib.contextmanager
def serving(root: Path, *arguments: str, name: str = "state", is_forked: bool = True) -> Iterator[Server]:
    """A server that is stopped at the end, and must then exit with 0."""
    server = Server(root, *arguments, name=name, is_forked=is_forked)
    try:
        yield server.wait_until_ready()
        assert server.stop() == 0, server.log_path.read_text()
    finally:
        if server.process.poll() is None:
            server.kill()


@contextlib.contextmanager
def doomed(root: Path, *arguments: str, is_forked: bool = True) -> Iterator[Server]:
    """A server that is killed at the end, or before."""
    server = Server(root, *arguments, is_forked=is_forked)
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

    def turn(self, server: Server, max_tokens: int = 50, **more: Any) -> dict[str, Any]:
        """Ask, and make the answer history. Raises httpx.HTTPError when the server goes away."""
        body = {**self.next_body(max_tokens), **more}
        response = server.http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer = response.json()
        self.messages = [*body["messages"], {"role": "assistant", "content": text_of(answer)}]
        self.answers.append(answer)
        return answer


_BUSY = ("requests_running", "requests_waiting", "requests_restoring", "spans_pending")


def wait_until(condition: Callable[[], object], what: str, most_s: float = 60.0) -> None:
    """The bound is for what hangs: a busy machine may take long."""
    deadline_s = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        time.sleep(0.01)


def at_rest(server: Server) -> dict[str, float]:
    """Metrics, once nothing is going on."""
    metrics: dict[str, float] = {}

    def is_at_rest() -> bool:
        metrics.update(server.metrics())
        return not any(metrics[name] for name in _BUSY)

    wait_until(is_at_rest, "the server is at rest")
    return metrics


def num_spans_on_disk(server: Server) -> int:
    """Those that the catalog names: they outlive a `kill -9`."""
    catalog = f"file:{server.state_dir}/catalog.sqlite?mode=ro"
    with contextlib.closing(sqlite3.connect(catalog, uri=True, timeout=60)) as connection:
        ((num_spans,),) = connection.execute("SELECT count(*) FROM span")
    return int(num_spans)


def wait_until_durable(server: Server) -> None:
    """Until everything that was accepted for saving is on disk. For when nothing runs."""
    wait_until(lambda: num_spans_on_disk(server) == at_rest(server)["store_spans"] > 0, "what was saved is durable")


class OnDisk:
    """What a server left in its state directory, as a stranger reads it; the server has ended."""

    def __init__(self, state_dir: Path) -> None:
        records = [row.record for row in look_at(state_dir).rows]
        self._span_ids = {record.span_id for record in records}
        self._firsts = {record.token_ids: record.span_id for record in records if record.parent_id is None}

    def num_tokens(self, token_ids: Sequence[int]) -> int:
        """Leading tokens that are saved."""
        spans = [pack_tokens(token_ids[at : at + SPAN_TOKENS]) for at in range(0, len(token_ids), SPAN_TOKENS)]
        if len(token_ids) % SPAN_TOKENS:
            spans.pop()
        span_id, num_saved = self._firsts.get(spans[0]) if spans else None, 0
        for packed in spans[1:]:
            if span_id not in self._span_ids:
                break
            num_saved, span_id = num_saved + SPAN_TOKENS, next_span_id(span_id, packed)
        return num_saved + SPAN_TOKENS * (span_id in self._span_ids)


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
