"""What rank 0 tells the others to do, in the order in which it does it itself.

Every change of the engine is a command with a name, told before rank 0 carries it out. Ranks start alike and do the
same, so their block tables agree without being compared; a digest of everything that was ever allocated and freed
travels with each command all the same, and a follower whose own differs ends rather than compute nonsense. The set of
commands is open: who adds state to an engine registers what must be told about it.

Messages are pickled. Their sockets are pairs that were made by rank 0 and inherited: nobody else holds an end.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from mii_hcache.errors import HCacheError, RankLostError

if TYPE_CHECKING:
    from mii_hcache.engine.parallel.follower import Follower

Handler = Callable[..., None]
"""`handler(follower, *arguments)`, on the follower's engine thread. What it raises ends the follower, and the server
with it: check on rank 0 before a command is told."""

STOP = "stop"
"""The last command."""

_HANDLERS: dict[str, Handler] = {}


def register(name: str, handler: Handler) -> None:
    """Let `name` be told. Call where the module that tells it is imported, on every rank."""
    if name in _HANDLERS or name == STOP:
        raise ValueError(f"there is a command {name!r} already")
    _HANDLERS[name] = handler


class CommandStream:
    """Rank 0's end. One thread at a time tells commands that belong together; single ones may come from any."""

    def __init__(self, links: Sequence[Connection], check: Callable[[], None]) -> None:
        """`check` raises RankLostError once a rank is gone."""
        self._links = list(links)
        self._check = check
        self._lock = threading.Lock()

    def tell(self, digest: int, name: str, *arguments: Any) -> None:
        """Send to every follower; `digest` is of rank 0's blocks before it does so itself. Does not wait for them.
        Raises RankLostError."""
        self._check()
        message = pickle.dumps((digest, name, arguments), protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            for link in self._links:
                try:
                    link.send_bytes(message)
                except OSError as error:  # gone, or it hangs and its socket is full
                    self._check()
                    raise RankLostError(f"a rank takes no more commands: {error}") from error


def follow(follower: Follower, link: Connection) -> None:
    """A follower's end: carry out commands until the last one. Raises what a command raises, HCacheError when the ranks
    do not agree any more, EOFError when rank 0 is gone."""
    while True:
        digest, name, arguments = pickle.loads(link.recv_bytes())
        own = follower.engine.allocator.digest
        if digest != own:
            raise HCacheError(
                f"rank {follower.group.rank} holds other blocks than rank 0 before {name!r} ({own:#x}, {digest:#x})"
            )
        if name == STOP:
            return
        _HANDLERS[name](follower, *arguments)


# --- the engine's own -------------------------------------------------------------------------------------------


def _put(follower: Follower, uids: list[int], token_ids: list[list[int]]) -> None:
    follower.engine.put(uids, [torch.tensor(own, dtype=torch.int64) for own in token_ids])


def _fill(follower: Follower, uid: int, start: int, token_ids: list[int], num_layers: int) -> None:
    follower.engine.target(uid).fill(start, torch.tensor(token_ids, dtype=torch.int64), num_layers)


register("put", _put)
register("logits", lambda follower, rows: follower.run_logits(rows))
register("fill", _fill)
register("reserve", lambda follower, uid, num_tokens: follower.engine.reserve(uid, num_tokens))
register("truncate", lambda follower, uid, num_tokens: follower.engine.truncate(uid, num_tokens))
register("evict", lambda follower, uid: follower.engine.evict(uid))
register("commit", lambda follower, uid, num_tokens: follower.engine.target(uid).commit(num_tokens))
register("poison", lambda follower: follower.engine.poison_free_blocks())
