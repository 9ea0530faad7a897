"""`kill -9` at random moments, many times: what was durable is restored, nothing wrong is ever served."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

import httpx
import pytest

from tests.end_to_end.server_kit import Chat, Server, doomed, restorable, serving, text_of

NUM_KILLS, NUM_CHATS, NUM_TURNS = 7, 4, 6
DURABLE_S = 1.0
"""An answer older than this when the server is killed must be restorable (commits follow within 0.2 s)."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[list[str]]:
    with serving(tmp_path_factory.mktemp("reference"), "--method", "recompute") as server:
        chats = [Chat(seed, num_words=60) for seed in range(NUM_CHATS)]
        for chat in chats:
            for _ in range(NUM_TURNS):
                chat.turn(server, 60)
    return [[text_of(answer) for answer in chat.answers] for chat in chats]


@dataclass
class Talker:
    """Turns of one conversation, each compared with what must be said; begins anew at the end."""

    chat: Chat
    expected: list[str]
    finished_s: float = 0.0
    error: BaseException | None = None

    def turn(self, server: Server) -> dict:
        answer = self.chat.turn(server, 60)
        self.finished_s = time.monotonic()
        assert text_of(answer) == self.expected[len(self.chat.answers) - 1]
        return answer

    def talk(self, server: Server) -> None:
        """Until the server is killed."""
        try:
            while True:
                if len(self.chat.answers) == NUM_TURNS:
                    self.chat.answers.clear()
                    self.chat.messages.clear()
                self.turn(server)
        except httpx.HTTPError:
            return
        except BaseException as error:
            self.error = error


def _wait_for_an_answer(talkers: list[Talker], most_s: float = 30.0) -> None:
    """Until one of them has a whole answer more, if that comes in time."""
    num_answers = sum(len(talker.chat.answers) for talker in talkers)
    deadline_s = time.monotonic() + most_s
    while sum(len(talker.chat.answers) for talker in talkers) == num_answers and time.monotonic() < deadline_s:
        time.sleep(0.01)


@pytest.mark.timeout(900)  # many servers start, one after the other
@pytest.mark.parametrize(
    "arguments",
    [("--keep", "none", "--method", "hidden"), ("--keep", "lru", "--method", "kv", "--kv-blocks", "260")],
    ids=["hidden", "kv"],
)
def test_killed_at_random_moments(tmp_path, expected, arguments):
    chance = random.Random(f"kills {arguments}")
    talkers = [Talker(Chat(seed, num_words=60), expected[seed]) for seed in range(NUM_CHATS)]
    killed_s = 0.0
    num_restored = num_checked = 0
    for kill_idx in range(NUM_KILLS):
        with doomed(tmp_path, *arguments) as server:
            for talker in talkers:  # one turn at a time: what was durable when the last server died must be restored
                if not talker.chat.answers or len(talker.chat.answers) == NUM_TURNS:
                    continue
                before = talker.chat.answers[-1]
                was_durable = killed_s - talker.finished_s > DURABLE_S
                hcache = talker.turn(server)["hcache"]
                num_checked += 1
                num_restored += hcache["restored_tokens"] > 0
                if was_durable:
                    assert hcache["restored_tokens"] >= restorable(before), hcache
            threads = [threading.Thread(target=talker.talk, args=(server,)) for talker in talkers]
            for thread in threads:
                thread.start()
            if kill_idx % 2:  # on a slow machine nobody would have said anything yet
                _wait_for_an_answer(talkers)
            time.sleep(chance.uniform(0.05, 1.2))
            killed_s = time.monotonic()
            server.kill()
            for thread in threads:
                thread.join()
        for talker in talkers:
            if talker.error is not None:
                raise talker.error
    assert num_checked > 0
    assert num_restored > 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "arguments", [("--method", "hidden"), ("--method", "kv", "--keep", "none")], ids=["hidden", "kv"]
)
def test_killed_at_rest_loses_nothing(tmp_path, expected, arguments):
    talkers = [Talker(Chat(seed, num_words=60), expected[seed]) for seed in range(NUM_CHATS)]
    for round_idx in range(3):
        with doomed(tmp_path, *arguments) as server:
            for talker in talkers:
                before = talker.chat.answers[-1] if talker.chat.answers else None
                hcache = talker.turn(server)["hcache"]
                if round_idx:
                    assert before is not None
                    assert hcache["restored_tokens"] == restorable(before)
                    assert hcache["restored_from"] == "file"
            time.sleep(DURABLE_S)
