"""Questions reach a follower in their order and are answered in any; a follower that is gone answers with an error."""

from __future__ import annotations

import os
import socket
import struct
import threading
from concurrent.futures import wait
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

from mii_hcache.engine.parallel.peers import RankPeers, start_answering
from mii_hcache.runtime.parts import Reply
from mii_hcache.runtime.peers import PeerLostError
from tests.runtime.kit import wait_until


def _peers(num_others: int) -> tuple[RankPeers, list]:
    pairs = [Pipe() for _ in range(num_others)]
    told: list = []
    engine = SimpleNamespace(
        followers=SimpleNamespace(io_links=[ours for ours, _ in pairs]),
        tell=lambda *order: told.append(order),
        lose=lambda error: told.append(str(error)),
    )
    peers = RankPeers(engine)
    peers.order("do this")
    assert told == [("state", "do this")] and peers.num_ranks == 1 + num_others
    told.clear()
    peers.told = told
    return peers, [theirs for _, theirs in pairs]


def test_answers_find_their_questions():
    peers, links = _peers(2)
    asked: list[list[int]] = [[], []]
    held: list[list[tuple[int, Reply]]] = [[], []]

    def answer_of(place):
        def answer(question: int, reply: Reply) -> None:
            asked[place].append(question)
            held[place].append((question, reply))
            if len(held[place]) == 10:  # the last first
                for number, late in reversed(held[place]):
                    late((place, number * number))
                held[place].clear()

        return answer

    for place, link in enumerate(links):
        start_answering(link, answer_of(place))
    answers = {(rank, number): peers.ask(rank, number) for number in range(100) for rank in (1, 2)}
    assert not wait(answers.values(), timeout=60).not_done
    assert all(answer.result() == (rank - 1, number * number) for (rank, number), answer in answers.items())
    assert asked == [list(range(100))] * 2


def test_many_threads_may_ask():
    peers, (link,) = _peers(1)
    start_answering(link, lambda question, reply: reply(question))
    wrong = []

    def ask(who: int) -> None:
        for number in range(200):
            if peers.ask(1, (who, number)).result(60) != (who, number):
                wrong.append((who, number))

    threads = [threading.Thread(target=ask, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_long_questions_and_long_answers_do_not_wait_for_each_other():
    peers, (link,) = _peers(1)
    start_answering(link, lambda question, reply: reply(question))
    answers = []
    asking = threading.Thread(
        target=lambda: answers.extend(peers.ask(1, bytes([number]) * 200_000) for number in range(50)), daemon=True
    )
    asking.start()
    asking.join(30)
    assert not asking.is_alive(), "no question goes out before an answer is taken, and no answer before a question"
    assert [answer.result(60)[0] for answer in answers] == list(range(50))


def test_who_is_gone_answers_nothing_more():
    peers, (link,) = _peers(1)
    before = peers.ask(1, "are you there?")
    assert not before.done()
    link.close()
    for answer in (before, peers.ask(1, "and now?")):
        with pytest.raises(PeerLostError, match="rank 1 is gone"):
            answer.result(60)
    assert peers.told == [], "whoever watches the ranks says so"


def test_who_takes_no_questions_is_lost():
    """It runs, and does not read: what was sent of a question is no question, and the next one must not follow it."""
    peers, (link,) = _peers(1)
    ours = peers._lines[0]._link
    with socket.socket(fileno=os.dup(ours.fileno())) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 100_000))
    asked = [peers.ask(1, bytes(1 << 20)) for _ in range(20)]
    for answer in asked:
        if answer.done():
            with pytest.raises(PeerLostError, match="rank 1 is gone"):
                answer.result()
    assert asked[-1].done() and peers._lines[0]._is_lost
    wait_until(lambda: peers.told)
    assert len(peers.told) == 1 and "rank 1 takes no more questions" in peers.told[0]
    link.close()


def test_an_answer_that_nobody_understands_ends_the_engine():
    peers, (link,) = _peers(1)
    open_question = peers.ask(1, "are you there?")
    link.send_bytes(b"no pickle")
    with pytest.raises(PeerLostError):
        open_question.result(60)
    wait_until(lambda: peers.told)
    assert len(peers.told) == 1 and "rank 1 answers what nobody understands" in peers.told[0]
