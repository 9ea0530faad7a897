"""Questions about saved state between rank 0 and the others, beside the stream of commands.

They are asked and answered by threads that no engine waits for, in any order. See `runtime.peers`, whose port this is.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection

from mii_hcache.engine.parallel.engine import ParallelEngine
from mii_hcache.errors import RankLostError
from mii_hcache.runtime.parts import Reply
from mii_hcache.runtime.peers import PeerLostError

_log = logging.getLogger(__name__)

Answer = Callable[[object, Reply], None]
"""`answer(question, reply)` on a follower: calls `reply` once, on any thread, and does not block for long."""

ORDER = "state"
"""Name of the command that carries an order."""


class RankPeers:
    """The other ranks, as rank 0 sees them. Any thread may ask; orders are the engine thread's to give."""

    def __init__(self, engine: ParallelEngine) -> None:
        """Becomes the only user of the followers' io links."""
        self._engine = engine
        self._lines = [_Line(rank, link, self._break) for rank, link in enumerate(engine.followers.io_links, start=1)]

    @property
    def num_ranks(self) -> int:
        """All of them, rank 0 included."""
        return 1 + len(self._lines)

    def order(self, order: object) -> None:
        """Have all followers do this, in the order of commands. Does not wait for them. Raises RankLostError."""
        self._engine.tell(ORDER, order)

    def ask(self, rank: int, question: object) -> Future[object]:
        """A follower's answer, PeerLostError in its place when the follower is gone. Questions come to a follower in
        the order in which they were asked."""
        return self._lines[rank - 1].ask(question)

    def _break(self, reason: str) -> None:
        """A rank that runs and does not talk cannot save or restore, and would cost every request its deadline."""
        self._engine.lose(RankLostError(reason))


class _Line:
    """To one follower."""

    def __init__(self, rank: int, link: Connection, on_broken: Callable[[str], None]) -> None:
        """`on_broken` hears why nothing can be asked or answered any more; not that the rank's end is closed, which
        whoever watches the ranks notices."""
        self._rank = rank
        self._on_broken = on_broken
        self._link = link
        self._sending = threading.Lock()
        """Numbers come in order. Taken before `_lock`; who takes answers never waits for it: a follower may read no
        question before its answer is taken."""
        self._lock = threading.Lock()
        """Guards what follows."""
        self._numbers = itertools.count()
        self._open: dict[int, Future[object]] = {}
        self._is_lost = False
        threading.Thread(target=self._listen, name=f"hcache-rank-{rank}-io", daemon=True).start()

    def ask(self, question: object) -> Future[object]:
        answer: Future[object] = Future()
        with self._sending:
            with self._lock:
                number = next(self._numbers)
                is_open = not self._is_lost
                if is_open:
                    self._open[number] = answer
            if is_open and not self._send(number, question):
                with self._lock:  # whoever takes an answer out ends it
                    is_open = self._open.pop(number, None) is None
        if not is_open:
            answer.set_exception(self._error())
        return answer

    def _send(self, number: int, question: object) -> bool:
        try:
            self._link.send((number, question))
            return True
        except BrokenPipeError:
            return False
        except OSError as error:  # it takes nothing: a part of this may have gone, and nothing fits behind it
            with self._lock:
                self._is_lost = True
            self._tell(f"rank {self._rank} takes no more questions: {error}")
            return False

    def _listen(self) -> None:
        try:
            while True:
                number, said = self._link.recv()
                with self._lock:
                    answer = self._open.pop(number)
                answer.set_result(said)
        except (EOFError, OSError):
            pass
        except Exception as error:
            _log.exception("an answer of rank %d could not be taken", self._rank)
            self._tell(f"rank {self._rank} answers what nobody understands: {error}")
        with self._lock:
            self._is_lost = True
            unanswered, self._open = self._open, {}
        for answer in unanswered.values():
            answer.set_exception(self._error())

    def _tell(self, reason: str) -> None:
        threading.Thread(target=self._on_broken, args=(reason,), name="hcache-broken-line", daemon=True).start()

    def _error(self) -> PeerLostError:
        return PeerLostError(f"rank {self._rank} is gone, and with it what it was asked for")


def start_answering(link: Connection, answer: Answer) -> None:
    """On a follower: a thread takes questions until rank 0 is gone. What `answer` raises ends that thread, and leaves
    what it was asked unanswered: it is to answer with what went wrong."""
    lock = threading.Lock()

    def reply_to(number: int) -> Reply:
        def reply(said: object) -> None:
            try:
                with lock:
                    link.send((number, said))
            except OSError:
                _log.debug("an answer came when nobody listened any more")

        return reply

    def listen() -> None:
        try:
            while True:
                number, question = link.recv()
                answer(question, reply_to(number))
        except (EOFError, OSError):
            return

    threading.Thread(target=listen, name="hcache-io", daemon=True).start()
