"""`kill -9` at random moments, many times: what was durable is restored, nothing wrong is ever served."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

import httpx
import pytest

from tests.end_to_end.server_kit import (
    Chat,
    OnDisk,
    Server,
    doomed,
    num_spans_on_disk,
    restorable,
    serving,
    text_of,
    wait_until,
    wait_until_durable,
)

NUM_KILLS, NUM_CHATS, NUM_TURNS = 7, 4, 6


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
    error: BaseException | None = None

    def turn(self, server: Server) -> dict:
        before = self.chat.answers[-1] if self.chat.answers else None
        answer = self.chat.turn(server, 60, return_token_ids=True)
        assert text_of(answer) == self.expected[len(self.chat.answers) - 1]
        if before is not None:  # the tokens of a turn whose end was told are known for ever
            said = before["prompt_token_ids"] + before["choices"][0]["token_ids"]
            assert answer["prompt_token_ids"][: len(said)] == said
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


@pytest.mark.timeout(900)  # many servers start, one after the other
@pytest.mark.parametrize(
    "arguments",
    [("--keep", "none", "--method", "hidden"), ("--keep", "lru", "--method", "kv", "--kv-blocks", "260")],
    ids=["hidden", "kv"],
)
def test_killed_at_random_moments(tmp_path, expected, arguments):
    """What a stranger finds in the files of a server that was killed comes back, all of it."""
    chance = random.Random(f"kills {arguments}")
    talkers = [Talker(Chat(seed, num_words=60), expected[seed]) for seed in range(NUM_CHATS)]
    on_disk = None
    num_restored = 0
    for kill_idx in range(NUM_KILLS):
        with doomed(tmp_path, *arguments) as server:
            for talker in talkers if on_disk is not None else ():  # one at a time: nobody's blocks are taken
                if len(talker.chat.answers) == NUM_TURNS:
                    continue
                answer = talker.turn(server)
                prompt, hcache = answer["prompt_token_ids"], answer["hcache"]
                assert hcache["restored_tokens"] >= on_disk.num_tokens(prompt[:-1]), hcache
                num_restored += hcache["restored_tokens"]
            threads = [threading.Thread(target=talker.talk, args=(server,)) for talker in talkers]
            for thread in threads:
                thread.start()
            if kill_idx % 2:  # on a slow machine nobody would have said anything yet
                _wait_for_an_answer(server, talkers)
            time.sleep(chance.uniform(0.05, 1.2))
            server.kill()
            for thread in threads:
                thread.join()
        for talker in talkers:
            if talker.error is not None:
                raise talker.error
        on_disk = OnDisk(server.state_dir)
    assert num_restored > 0


def _wait_for_an_answer(server: Server, talkers: list[Talker]) -> None:
    """Until one of them has a whole answer more, and something is in the files."""
    num_before = [len(talker.chat.answers) for talker in talkers]

    def is_there() -> bool:
        has_failed = any(talker.error is not None for talker in talkers)
        has_answer = [len(talker.chat.answers) for talker in talkers] != num_before
        return has_failed or (has_answer and num_spans_on_disk(server) > 0)

    wait_until(is_there, "somebody talks, and it is saved")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "arguments", [("--method", "hidden"), ("--method", "kv", "--keep", "none")], ids=["hidden", "kv"]
)
def test_killed_at_rest_loses_nothing(tmp_path, expected, arguments):
    """What was accepted for saving is durable soon, by itself; then nothing of it is lost."""
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
            wait_until_durable(server)
