"""The real thing once: a conversation, an end by SIGTERM, a new server that restores it from disk."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("mii")

_ROOT = Path(__file__).resolve().parents[2]


class RealServer:
    """`python -m mii_hcache.serve` with the demo model."""

    def __init__(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "mii_hcache.serve", "--port", "0", "--state-dir", str(tmp_path / "state")]
        self._output = tmp_path / "output"
        with self._output.open("wb") as file:
            self._popen = subprocess.Popen(
                [*command, "--kv-blocks", "256", "--state-capacity", "256MiB", "--dram-capacity", "16MiB"],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=_ROOT,
            )

    def client(self) -> openai.OpenAI:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"address  (http://\S+)", self._output.read_text())):
            assert self._popen.poll() is None and time.monotonic() < deadline, self._output.read_text()
            time.sleep(0.05)
        return openai.OpenAI(base_url=found.group(1) + "/v1", api_key="none", max_retries=0, timeout=60)

    def terminate(self) -> int:
        self._popen.send_signal(signal.SIGTERM)
        return self._popen.wait(60)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()


@pytest.fixture
def start(tmp_path):
    servers = []

    def start() -> RealServer:
        servers.append(RealServer(tmp_path))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def _ask(client, messages):
    reply = client.chat.completions.create(
        model="mii-hcache-demo", messages=messages, max_tokens=100, temperature=0, extra_body={"ignore_eos": True}
    )
    return reply.choices[0].message.content, reply


def test_a_conversation_survives_a_restart(start):
    server = start()
    with server.client() as client:
        messages = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]
        for question in ("Who lives there?", "How does it end?"):
            answer, _ = _ask(client, messages)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        ending, reply = _ask(client, messages)
        assert reply.hcache["resident_tokens"] > 200 and reply.hcache["miss_reason"] is None
        stream = client.chat.completions.create(
            model="mii-hcache-demo", messages=messages, max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        assert server.terminate() == 0
        assert [*stream][-1].choices[0].finish_reason == "length"  # its answer was finished first

    server = start()
    with server.client() as client:
        again, reply = _ask(client, messages)
        hcache = reply.hcache
        assert again == ending
        assert hcache["resident_tokens"] == 0 and hcache["restored_from"] == "file" and hcache["miss_reason"] is None
        num_whole_spans = (reply.usage.prompt_tokens - len("How does it end?")) // 64
        assert hcache["restored_tokens"] >= 64 * num_whole_spans >= 192
        assert reply.usage.prompt_tokens_details.cached_tokens == hcache["restored_tokens"]
        assert hcache["prefill_tokens"] == reply.usage.prompt_tokens - hcache["restored_tokens"]
    assert server.terminate() == 0
