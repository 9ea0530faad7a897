"""A server over several processes: whichever of them dies, at whatever moment, all of them are gone soon, and clients
and operator are told why."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.server_kit import Chat, Server, restorable, serving, text_of, wait_until, wait_until_durable
from tests.engine.parallel.ranks_kit import children_of, is_running, wait_until_gone

END_S = 30.0
"""Longest that a server may take to end once a rank is gone. It forces itself after 7 s; this machine may be busy."""
LOST = 3
"""Exit status of a server that lost a rank."""


def _start(root: Path, size: int = 2, *arguments: str, is_forked: bool = True) -> Server:
    return Server(root, "--tensor-parallel", str(size), *arguments, is_forked=is_forked)


def _others(server: Server, size: int) -> list[int]:
    """Process ids of ranks 1 and up, as soon as all are there. Libraries start children of their own, for a moment."""
    found: list[int] = []

    def are_there() -> bool:
        assert server.process.poll() is None, server.log_path.read_text()
        found[:] = [pid for pid in children_of(server.process.pid) if _is_rank(pid)]
        return len(found) >= size - 1

    wait_until(are_there, "all ranks have been started", most_s=120)
    return found


def _is_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"mii_hcache.engine.parallel" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _wait_until_taken(server: Server, talker: threading.Thread) -> None:
    """A request that was sent a moment ago has reached the engine, or is over."""
    names = [f"requests_{name}" for name in ("running", "waiting", "restoring")]

    def is_taken() -> bool:
        metrics = server.metrics()
        return any(metrics[name] for name in names) or not talker.is_alive()

    wait_until(is_taken, "the request has reached the engine")


def _stream(server: Server, body: dict[str, Any], heard: list[str]) -> None:
    """Everything that a client hears, and how the stream ended."""
    with contextlib.suppress(httpx.TransportError):
        with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            heard.append(f"status {response.status_code}")
            for line in response.iter_lines():
                heard.append(line)
        heard.append("end")


def _expect_end(server: Server, others: list[int], killed: int, size: int) -> str:
    """The server ends in time, with its status and reason; its log."""
    assert server.process.wait(timeout=END_S) == LOST, server.log_path.read_text()
    wait_until_gone(others, END_S)
    log = server.log_path.read_text()
    assert f"of {size} (process {killed}) was killed by SIGKILL" in log
    assert "so the server ends; start it again" in log and "Traceback" not in log
    return log


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process says that saves nothing: the whole of one conversation, and the first answer of another."""
    long, short = Chat(9, num_words=120), Chat(7)
    with serving(tmp_path_factory.mktemp("alone"), "--method", "recompute") as server:
        for _ in range(3):
            long.turn(server)
        short.turn(server)
    return long, short


MOMENTS = {"idle": 0, "decode": 400, "prefill": 2}
"""Moment and the tokens that are asked for."""


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("moment", "size"), [("idle", 4), ("decode", 2), ("prefill", 2)])
def test_a_rank_that_is_killed_ends_the_server(tmp_path, moment, size):
    chance = random.Random(f"{moment} {size}")
    server = _start(tmp_path, size)
    try:
        server.wait_until_ready()
        others = _others(server, size)
        assert len(others) == size - 1
        Chat(1).turn(server, 4)
        heard: list[str] = []
        if moment != "idle":
            chat = Chat(2, num_words=1400 if moment == "prefill" else 20)
            talker = threading.Thread(target=_stream, args=(server, chat.next_body(MOMENTS[moment]), heard))
            talker.start()
            _wait_until_taken(server, talker)
            if moment == "decode":
                wait_until(lambda: len(heard) >= 10 or not talker.is_alive(), "the answer has begun")
            time.sleep(chance.uniform(0.0, 0.2))
        killed = chance.choice(others)
        os.kill(killed, signal.SIGKILL)
        _expect_end(server, others, killed, size)
        if moment != "idle":
            talker.join(END_S)
            assert not talker.is_alive()
            is_whole = any('"finish_reason":"length"' in line for line in heard)  # it was all over before
            assert is_whole or any("was killed by SIGKILL" in line for line in heard), heard[-3:]
    finally:
        server.kill()


@pytest.mark.timeout(400)
def test_what_was_saved_outlives_a_rank_that_is_killed_in_a_restore(tmp_path, alone):
    """Reads are slowed down, so that there is a restore to be killed in."""
    expected, _ = alone
    chat, saving = Chat(9, num_words=120), ("--method", "hidden", "--keep", "none")
    server = _start(tmp_path, 2, *saving, "--emulate-read-speed", "100KiB")
    try:
        server.wait_until_ready()
        (other,) = _others(server, 2)
        chat.turn(server)
        wait_until_durable(server)
        heard: list[str] = []
        talker = threading.Thread(target=_stream, args=(server, chat.next_body(50), heard))
        talker.start()
        wait_until(lambda: server.metrics()["requests_restoring"] or "end" in heard, "a restore has begun")
        assert "end" not in heard, "there was nothing to be killed in"
        os.kill(other, signal.SIGKILL)
        _expect_end(server, [other], other, 2)
        talker.join(END_S)
        assert not talker.is_alive()
        assert "end" not in heard or any("was killed by SIGKILL" in line for line in heard), heard[-3:]
    finally:
        server.kill()
    with serving(tmp_path, "--tensor-parallel", "2", *saving) as server:
        for turn in (1, 2):
            before = chat.answers[-1]
            hcache = chat.turn(server)["hcache"]
            assert hcache["restored_tokens"] == restorable(before) > 0, hcache
            assert text_of(chat.answers[turn]) == text_of(expected.answers[turn])


@pytest.mark.timeout(400)
def test_a_rank_that_is_killed_while_it_loads_ends_the_start(tmp_path):
    server = _start(tmp_path)
    try:
        (other,) = _others(server, 2)
        time.sleep(random.Random(3).uniform(0.2, 2.0))
        os.kill(other, signal.SIGKILL)
        _expect_end(server, [other], other, 2)
    finally:
        server.kill()


@pytest.mark.timeout(400)
def test_no_rank_outlives_rank_0(tmp_path):
    server = _start(tmp_path)
    try:
        server.wait_until_ready()
        others = _others(server, 2)
        meeting = Path(Path(f"/proc/{others[0]}/cmdline").read_bytes().split(b"\0")[5].decode())
        assert meeting.is_dir()
        talker = threading.Thread(target=_stream, args=(server, Chat(5).next_body(400), []))
        talker.start()
        _wait_until_taken(server, talker)
        server.process.kill()
        server.process.wait()
        wait_until_gone(others, END_S)
        talker.join(END_S)
        assert not talker.is_alive()
        assert meeting.name.startswith("mii-hcache-ranks-") and not meeting.exists(), "nothing is left behind"
    finally:
        server.kill()


@pytest.mark.timeout(400)
def test_a_rank_that_hangs_ends_the_server(tmp_path):
    """Stopped, not dead: no line is closed. Its silence, or a step that nobody joins, gives it away."""
    server = _start(tmp_path)
    try:
        server.wait_until_ready()
        (other,) = _others(server, 2)
        os.kill(other, signal.SIGSTOP)
        heard: list[str] = []
        _stream(server, Chat(6).next_body(50), heard)
        assert server.process.wait(timeout=30 + END_S) == LOST
        wait_until_gone([other], END_S)
        assert "hangs: nothing was heard of it for" in server.log_path.read_text()
        assert any("hangs" in line for line in heard) or "end" not in heard
    finally:
        server.kill()


@pytest.mark.timeout(400)
def test_ctrl_c_ends_all_in_order_and_says_the_same_as_one_process(tmp_path, alone):
    chat = Chat(7)
    server = _start(tmp_path, is_forked=False)
    try:
        server.wait_until_ready()
        others = _others(server, 2)
        running = Chat(8)
        talker = threading.Thread(target=running.turn, args=(server, 60))
        assert text_of(chat.turn(server)) == text_of(alone[1].answers[0])
        talker.start()
        _wait_until_taken(server, talker)
        server.process.send_signal(signal.SIGINT)
        for other in others:  # a terminal, or a service manager, tells every process
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGTERM)
                os.kill(other, signal.SIGINT)
                os.kill(other, signal.SIGHUP)
        assert server.process.wait(timeout=120) == 0, server.log_path.read_text()
        talker.join(END_S)
        assert running.answers[0]["usage"]["completion_tokens"] == 60, "running answers end"
        assert not any(is_running(other) for other in others)
        assert "Good bye" in server.log_path.read_text()
    finally:
        server.kill()


def test_a_rank_is_nothing_to_be_started_by_hand():
    told = subprocess.run(
        [sys.executable, "-m", "mii_hcache.engine.parallel"], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 1 and "--tensor-parallel starts" in told.stderr
