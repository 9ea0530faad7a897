"""Conversations over HTTP as text, with a tokenizer whose output does not round-trip."""

from __future__ import annotations

import json
import signal
import threading

import pytest

from tests.end_to_end.server_kit import Chat, Server, doomed, interleave, restorable, serving, text_of, wait_until

NUM_CHATS, NUM_TURNS = 5, 3
HIDDEN = ("--method", "hidden")
"""Restores whatever it costs: what the default does depends on the machine."""


@pytest.fixture(scope="module")
def never_evicted(tmp_path_factory):
    """What a server says whose histories never leave its memory, and whose pool is never short."""
    root = tmp_path_factory.mktemp("reference")
    with serving(root, "--method", "recompute", "--keep", "lru") as server:
        chats = [Chat(seed) for seed in range(NUM_CHATS)]
        interleave(server, chats, NUM_TURNS)
        assert server.metrics()["resident_tokens_total"] > 0
    return [[text_of(answer) for answer in chat.answers] for chat in chats]


def _said(chats: list[Chat]) -> list[list[str]]:
    return [[text_of(answer) for answer in chat.answers] for chat in chats]


@pytest.mark.parametrize("method", ["hidden", "kv"])
def test_evicted_after_every_turn(tmp_path, never_evicted, method):
    with serving(tmp_path, "--keep", "none", "--method", method) as server:
        chats = [Chat(seed) for seed in range(NUM_CHATS)]
        interleave(server, chats, NUM_TURNS)
    assert _said(chats) == never_evicted
    for chat in chats:
        for before, answer in zip(chat.answers, chat.answers[1:], strict=False):
            hcache, usage = answer["hcache"], answer["usage"]
            assert hcache["restored_tokens"] == restorable(before) > 0
            assert hcache["resident_tokens"] == 0
            assert hcache["restored_from"] == "memory"
            assert hcache["method"] == method
            assert hcache["miss_reason"] is None
            assert usage["prompt_tokens_details"]["cached_tokens"] == hcache["restored_tokens"]
            assert hcache["prefill_tokens"] == usage["prompt_tokens"] - hcache["restored_tokens"]


def test_a_turn_in_each_process(tmp_path, never_evicted):
    """Stopped and started again between turns: the state comes from files, the ids of the text from the transcripts."""
    chats = [Chat(seed) for seed in range(NUM_CHATS)]
    for turn in range(NUM_TURNS):
        with serving(tmp_path, *HIDDEN) as server:
            interleave(server, chats, 1)
        if turn:
            for chat in chats:
                assert chat.answers[turn]["hcache"]["restored_from"] == "file"
                assert chat.answers[turn]["hcache"]["restored_tokens"] == restorable(chat.answers[turn - 1])
    assert _said(chats) == never_evicted


def test_the_default_plans_and_says_the_same(tmp_path, never_evicted):
    """What it plans depends on how fast this machine is just now; what it says does not."""
    chats = [Chat(seed) for seed in range(NUM_CHATS)]
    for turn in range(NUM_TURNS):
        with serving(tmp_path, "--keep", "none" if turn else "lru") as server:
            interleave(server, chats, 1)
            assert "planned from what this machine measured" in server.log_path.read_text()
        for chat in chats:
            usage, hcache = chat.answers[turn]["usage"], chat.answers[turn]["hcache"]
            parts = [hcache[f"{part}_tokens"] for part in ("resident", "restored", "recomputed", "prefill")]
            assert sum(parts) == usage["prompt_tokens"]
            if turn and not hcache["restored_tokens"]:
                assert hcache["miss_reason"] == "slower"
    assert (tmp_path / "state" / "profile.json").exists()
    assert _said(chats) == never_evicted


def test_edited_history_is_said_to_be_changed_and_answered_right(tmp_path):
    with serving(tmp_path, "--keep", "none") as server:
        chat = Chat(seed=9)
        chat.turn(server)
        chat.turn(server)
        edited = Chat(seed=9, messages=[dict(message) for message in chat.messages])
        edited.answers = list(chat.answers)
        edited.messages[1]["content"] = "(edited) " + edited.messages[1]["content"]
        answer = edited.turn(server)
        assert answer["hcache"]["miss_reason"] == "text_changed"
        with serving(tmp_path, "--method", "recompute", name="other") as reference:
            again = Chat(seed=9, messages=edited.messages[:-2])
            again.answers = list(chat.answers)
            assert text_of(again.turn(reference)) == text_of(answer)


def test_a_shared_document_is_restored_for_a_stranger(tmp_path):
    document = " ".join(f"Paragraph {idx}: nobody wrote this sentence before." for idx in range(60))
    with serving(tmp_path, *HIDDEN, "--keep", "none") as server:
        bodies = [
            {"messages": [{"role": "user", "content": f"{document} Question: {question}"}], "max_tokens": 8}
            for question in ("who?", "where, and when?")
        ]
        first, second = (server.http.post("/v1/chat/completions", json=body).json() for body in bodies)
        assert first["hcache"]["restored_tokens"] == 0
        assert second["hcache"]["restored_tokens"] >= 64 * ((first["usage"]["prompt_tokens"] - 20) // 64) > 500


def test_term_finishes_running_answers_and_flushes(tmp_path):
    chat = Chat(seed=4)
    body = {**chat.next_body(600), "stream": True}
    pieces: list[str] = []
    last: dict = {}

    def read(server: Server) -> None:
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    last.update(event)
                    pieces.extend(choice["delta"].get("content") or "" for choice in event["choices"])

    with doomed(tmp_path, *HIDDEN, "--keep", "none", is_forked=False) as server:
        reader = threading.Thread(target=read, args=(server,))
        reader.start()
        wait_until(lambda: len(pieces) >= 5 or not reader.is_alive(), "an answer has begun")
        server.process.send_signal(signal.SIGTERM)
        reader.join()
        assert server.process.wait(timeout=120) == 0
    assert last["hcache"]["prefill_tokens"] > 0, "the stream ended with its last chunk"
    with serving(tmp_path, *HIDDEN, "--keep", "none") as server:
        chat.messages = [*body["messages"], {"role": "assistant", "content": "".join(pieces)}]
        chat.answers.append({})
        answer = chat.turn(server)
        assert answer["hcache"]["restored_from"] == "file"
        assert answer["hcache"]["restored_tokens"] >= 600


def test_one_server_a_state_directory(tmp_path):
    with serving(tmp_path) as server:
        second = Server(tmp_path, is_forked=False)
        try:
            assert second.process.wait(timeout=120) == 2
        finally:
            second.kill()
        log = second.log_path.read_text()
        assert str(server.process.pid) in log
        assert "Traceback" not in log
