"""The command as a process: how it starts, what it says, how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from serve_kit import wait_until

from mii_hcache.config import default_state_dirs
from mii_hcache.serve.listening import Server
from mii_hcache.storage.state_dir import StateDir

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
PATIENT_S = 60
"""A busy machine may take long. What would never end still fails."""
get = partial(httpx.get, timeout=PATIENT_S)


class Process:
    """A running server's command and what it has printed."""

    def __init__(self, command: list[str], output: Path) -> None:
        self._output = output
        self.hold = output.with_suffix(".hold")
        """While this file is there, answers stand still."""
        with output.open("wb") as file:
            env = {**os.environ, "PYTHONPATH": str(_ROOT), "HOLD": str(self.hold)}
            env.pop("MII_HCACHE_API_KEY", None)
            self.popen = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=_HERE, env=env)

    @property
    def text(self) -> str:
        return self._output.read_text()

    def url(self) -> str:
        """Once it says where it listens."""
        self.wait_for("Ready after")
        return re.findall(r"address  (http://\S+)", self.text)[0]

    def wait_for(self, words: str) -> None:
        """Until it has said them."""
        wait_until(lambda: words in self.text or self.popen.poll() is not None)
        assert words in self.text, self.text

    def end(self, *signals: signal.Signals) -> int:
        for number in signals:
            self.popen.send_signal(number)
        return self.popen.wait(PATIENT_S)


@pytest.fixture
def start(tmp_path):
    running = []

    def start(*arguments: str) -> Process:
        command = [sys.executable, str(_HERE / "fake_server.py"), "--port", "0", *arguments]
        running.append(Process(command, tmp_path / f"out{len(running)}"))
        return running[-1]

    yield start
    for process in running:
        process.popen.kill()
        process.popen.wait()


def _command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mii_hcache.serve", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=60
    )


def test_help_is_complete_and_imports_nothing_heavy():
    code = (
        "import sys; from mii_hcache.serve.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: print([name for name in ('torch', 'transformers', 'deepspeed', 'fastapi') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "examples:" in done.stdout and "--state-capacity" in done.stdout
    assert done.stdout.endswith("\n[]\n")


def test_a_port_in_use_is_said_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _command("--port", str(port))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        f"mii_hcache.serve: cannot listen on 127.0.0.1 port {port}: Address already in use; "
        "choose another --port or --host"
    )
    assert "loading" not in done.stdout


def test_a_state_directory_in_use_is_said_before_the_model_is_loaded(tmp_path):
    owned = StateDir(tmp_path / "owned")
    done = _command("--port", "0", "--state-dir", str(tmp_path / "free"), "--state-dir", str(owned.path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        f"mii_hcache.serve: state directory {owned.path} is in use by process {os.getpid()}; stop that server, or give "
        "this one a directory of its own"
    )
    assert "loading" not in done.stdout and not (tmp_path / "free").exists()
    owned.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-blocks", "0"], "--kv-blocks must be >= 1, got 0"),
        (["--host", "no.such.host.invalid"], "--host 'no.such.host.invalid' is no address"),
        (["--state-dir", __file__], "--state-dir must be a directory"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message):
    done = _command(*arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_start_says_where_what_and_how(start):
    process = start()
    url = process.url()
    assert get(url + "/health").json()["status"] == "ok"
    for words in (
        "model    demo, float32, 4 layers of 256; conversations up to 10,000 tokens",
        "method   hidden, chosen by --method; saves 3 of 4 layers as hidden states, 3KiB a token "
        "(all hidden 3KiB, all K and V 8KiB)",
        "KV pool  1,600 tokens in 100 blocks; they stay after a turn until they are needed (--keep lru)",
        f"state    {default_state_dirs()[0]}: 192 tokens in 3 spans are there",
        "room     for 6,990,464 tokens on disk (20GiB), 699,008 of them in memory as well (2GiB)",
        "access   this machine only, without a key",
        "note     a note",
    ):
        assert f"  {words}\n" in process.text
    (curl,) = re.findall(r"^  (curl .*)$", process.text, re.MULTILINE)
    reply = subprocess.run(["bash", "-c", curl + " -s"], capture_output=True, text=True, timeout=PATIENT_S)
    assert '"hcache"' in reply.stdout
    assert process.end(signal.SIGTERM) == 0


def test_an_open_host_needs_a_key_or_a_word(start, tmp_path):
    process = start("--host", "0.0.0.0")
    assert process.popen.wait(PATIENT_S) == 2
    (line,) = process.text.splitlines()
    assert "--allow-no-key" in line and "MII_HCACHE_API_KEY" in line
    process = start("--host", "0.0.0.0", "--allow-no-key")
    assert get(process.url() + "/health").status_code == 200
    assert "access   ANYBODY who can reach this machine" in process.text
    assert process.end(signal.SIGINT) == 0


def test_keys(start, tmp_path):
    (tmp_path / "keys").write_text("sk-one\nsk-two\n")
    process = start("--host", "0.0.0.0", "--api-key-file", str(tmp_path / "keys"))
    url = process.url() + "/v1/models"
    assert "access   2 API keys; no two of them share state" in process.text
    assert [get(url, headers={"Authorization": f"Bearer sk-{key}"}).status_code for key in ("two", "x")] == [
        200,
        401,
    ]
    (curl,) = re.findall(r"^  (curl .*)$", process.text, re.MULTILINE)
    env = {**os.environ, "MII_HCACHE_API_KEY": "sk-one"}
    reply = subprocess.run(["bash", "-c", curl + " -s"], capture_output=True, text=True, timeout=PATIENT_S, env=env)
    assert '"hcache"' in reply.stdout
    assert process.end(signal.SIGTERM) == 0
    assert "sk-" not in process.text


def _ask(url, body=None):
    body = {"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True} if body is None else body
    return httpx.post(url + "/v1/completions", json=body, timeout=PATIENT_S).json()


def test_quiet_by_default(start):
    process = start()
    url = process.url()
    before = process.text
    assert "noise of a library" not in before
    _ask(url)
    _ask(url, {"prompt": []})
    get(url + "/nothing")
    assert process.end(signal.SIGTERM) == 0
    stopping, *rest = process.text.removeprefix(before).splitlines()
    assert stopping.startswith("Stopping: ") and rest == ["closed with drain", "Saved state is on disk. Good bye."]


def test_verbose(start):
    process = start("--verbose")
    url = process.url()
    assert process.text.count("noise of a library") == 1
    reply = _ask(url)
    _ask(url, {"prompt": []})
    get(url + "/health")
    get(url + "/no%0Athing")
    assert process.end(signal.SIGTERM) == 0
    for line in (
        rf"POST /v1/completions 200 in \d+\.\d+ s, {reply['id']}, 2 prompt tokens \(0 resident, 0 restored\), "
        r"3 generated, first token after \d+ ms",
        r"POST /v1/completions 400 in \d+\.\d+ s",
        r"GET /health 200 in \d+\.\d+ s",
        r"GET /no%0Athing 404 in \d+\.\d+ s",
    ):
        assert re.search(f"mii_hcache.serve.requests: {line}$", process.text, re.MULTILINE)


def test_lines_of_json(start):
    process = start("--log-json")
    process.wait_for('"message": "ready"')
    wait_until(lambda: process.text.endswith("\n"))
    lines = [json.loads(line) for line in process.text.splitlines()]
    url, ready = lines[-1]["url"], lines[-1]
    assert (ready["hidden_bytes_per_token"], ready["kv_bytes_per_token"], ready["saved_tokens"]) == (3072, 8192, 192)
    assert "reading weights" in [line["message"] for line in lines]
    reply = _ask(url)
    body = {"prompt": [5, 6], "max_tokens": 9000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=PATIENT_S) as response:
        next(response.iter_lines())
    process.wait_for("was not finished")  # the server has seen that the client is gone
    _ask(url, {"prompt": []})
    get(url + "/health")
    assert process.end(signal.SIGTERM) == 0
    text = process.text.replace("closed with drain\n", "")  # of the fake engine
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(list(line)[:4] == ["time", "level", "logger", "message"] for line in lines)
    whole, left, refused = [line for line in lines if line["logger"] == "mii_hcache.serve.requests"]
    assert (whole["id"], whole["status"], whole["finished"]) == (reply["id"], 200, True)
    assert (whole["prompt_tokens"], whole["completion_tokens"]) == (2, 3)
    assert whole["hcache"] == reply["hcache"] and whole["ttft_ms"] == reply["hcache"]["ttft_ms"]
    assert whole["duration_ms"] > 20
    assert left["finished"] is False and "hcache" not in left
    assert refused["status"] == 400 and "id" not in refused


def test_what_is_wrong_is_a_line_of_json(start):
    process = start("--log-json", "--host", "0.0.0.0")
    assert process.popen.wait(PATIENT_S) == 2
    (line,) = [json.loads(line) for line in process.text.splitlines()]
    assert line["level"] == "error" and "--allow-no-key" in line["message"]


@contextmanager
def hangup(reaction: signal.Handlers) -> Iterator[None]:
    """What is started meanwhile inherits it, whether these tests run under nohup or not."""
    before = signal.signal(signal.SIGHUP, reaction)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _is_refused(url: str) -> bool:
    """Whether nobody listens. One that came in at the last moment is cut off, which is no answer to that."""
    try:
        get(url + "/health")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        pass
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_running_streams(start, number):
    with hangup(signal.SIG_DFL):
        process = start()
    url = process.url()
    body = {"prompt": [5, 6], "max_tokens": 30, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=PATIENT_S) as response:
        lines = response.iter_lines()
        next(lines)
        process.hold.touch()
        process.popen.send_signal(number)
        wait_until(lambda: _is_refused(url))
        process.hold.unlink()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert process.end() == 0
    assert process.text.count("closed with drain") == 1 and "Good bye" in process.text


def test_whoever_reads_the_output_may_end_first(tmp_path):
    command = [sys.executable, str(_HERE / "fake_server.py"), "--port", "0"]
    env = {**os.environ, "PYTHONPATH": str(_ROOT)}
    with (tmp_path / "errors").open("w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=_HERE, env=env)
    assert server.stdout is not None
    try:
        assert any(b"Ready after" in line for line in iter(server.stdout.readline, b""))
        server.stdout.close()  # as `serve.sh | tee log` does at Ctrl-C
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENT_S) == 0
    finally:
        server.kill()
        server.wait()
    assert (tmp_path / "errors").read_text().splitlines()[-1] == "closed with drain"


def test_a_closed_terminal_ends_no_server_under_nohup(start):
    with hangup(signal.SIG_IGN):
        process = start()
    url = process.url()
    process.popen.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert get(url + "/health").status_code == 200
    assert process.end(signal.SIGTERM) == 0


def test_a_second_signal_does_not_wait(start):
    process = start()
    body = {"prompt": [5, 6], "max_tokens": 9000, "ignore_eos": True, "stream": True}  # a minute and a half
    with httpx.stream("POST", process.url() + "/v1/completions", json=body, timeout=PATIENT_S) as response:
        lines = response.iter_lines()
        next(lines)
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("Stopping: ")  # two at once would be one
        assert process.end(signal.SIGTERM) == 1
    assert "closed with drain" not in process.text and "Stopped without waiting" in process.text


def test_no_requests_no_wait(start):
    process = start()
    with httpx.Client(base_url=process.url()) as idle:
        idle.get("/health", timeout=PATIENT_S)  # leaves a connection open
        assert process.end(signal.SIGTERM) == 0, "it does not wait for what may never come"


def test_what_signals_do():
    app = FastAPI()
    app.state.answering = SimpleNamespace(draining=False)
    server = Server(app, on_started=lambda: None)
    server._is_running = True
    with server.taking_signals():
        signal.raise_signal(signal.SIGTERM)
        assert (app.state.answering.draining, server.should_exit, server.force_exit) == (True, True, False)
        assert not server.forced
        signal.raise_signal(signal.SIGINT)
        assert server.force_exit and server.forced
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
