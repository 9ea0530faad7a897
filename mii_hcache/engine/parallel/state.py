"""Saved state of a model over several ranks: each saves and reads its share, as rank 0 says (`runtime.peers`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mii_hcache.engine.parallel.commands import register
from mii_hcache.engine.parallel.engine import ParallelBlocks, ParallelEngine
from mii_hcache.engine.parallel.follower import Follower
from mii_hcache.engine.parallel.peers import ORDER, RankPeers, start_answering
from mii_hcache.errors import ConfigError, HCacheError
from mii_hcache.runtime.following import FollowingState
from mii_hcache.runtime.gathering import Gathering
from mii_hcache.runtime.peers import Counted
from mii_hcache.runtime.ports import KVTarget
from mii_hcache.runtime.ranks_profile import RanksStore, RanksTarget
from mii_hcache.runtime.restorer import OpenTiles
from mii_hcache.runtime.saver import Saver
from mii_hcache.runtime.sharded_saver import ShardedSaver
from mii_hcache.runtime.sharded_tiles import ShardedTiles
from mii_hcache.runtime.share import Share
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.open_io import open_io
from mii_hcache.storage.slot_files import SlotFiles
from mii_hcache.storage.throttled import Throttle

OPEN = "open state"
ANSWER_S = 20.0
"""Longest that the others may take to say what they counted."""


class SharedState:
    """Rank 0's way to the state of all ranks. One for an engine; before any order or question."""

    def __init__(
        self,
        engine: ParallelEngine,
        store: ChunkStore | None = None,
        *,
        io: str,
        emulated_read_bytes_per_s: float | None = None,
    ) -> None:
        """`store`: the one whose state all ranks save and restore; None to measure only. `io`,
        `emulated_read_bytes_per_s`: of each rank (see HCacheConfig). Raises ConfigError for a store that only one
        process can read, RankLostError."""
        assert engine.group is not None
        if store is not None and store.directions([]) is None:
            raise ConfigError(
                f"tensor_parallel is {engine.group.size}, and state_dir keeps state where only one process can read it "
                "(a raw namespace, or memory): choose directories of files, or method recompute"
            )
        engine.tell(OPEN, io, emulated_read_bytes_per_s)
        self.peers = RankPeers(engine)
        self._gather = engine.group.beside.all_gather_rows

    def open_saver(self, **settings: Any) -> Saver:
        """As `Saver`."""
        return ShardedSaver(peers=self.peers, **settings)

    @property
    def open_tiles(self) -> OpenTiles:
        """For `Restorer`."""
        return partial(ShardedTiles, uid_of=_uid_of, peers=self.peers)

    @property
    def gathering(self) -> Gathering:
        """For `Restorer`."""
        return Gathering(share=Share(rank=0, num_ranks=self.peers.num_ranks), gather=self._gather)

    def target_of(self, engine: ParallelEngine, uid: int) -> RanksTarget:
        """A sequence's blocks on all ranks, to measure with."""
        target = engine.target(uid)
        return RanksTarget(adapter=engine.own, target=target, uid=uid, peers=self.peers, gather=self._gather)

    def read_by_all(self, store: ChunkStore) -> ChunkStore:
        """A store whose reads all ranks share, to measure with; takes it over."""
        return RanksStore(store, self.peers)

    def counted(self) -> Sequence[dict[str, float]]:
        """What the others counted so far, rank 1 first. Blocks. Raises HCacheError when one is gone or silent."""
        answers = [self.peers.ask(rank, Counted()) for rank in range(1, self.peers.num_ranks)]
        try:
            return [dict(answer.result(ANSWER_S)) for answer in answers]  # type: ignore[call-overload]
        except TimeoutError as error:
            raise HCacheError(f"a rank did not say within {ANSWER_S:g} s what it counted") from error


def _uid_of(target: KVTarget) -> int:
    assert isinstance(target, ParallelBlocks)
    return target.uid


def _open(follower: Follower, io: str, emulated_read_bytes_per_s: float | None) -> None:
    """On a follower."""
    throttle = None if emulated_read_bytes_per_s is None else Throttle(emulated_read_bytes_per_s)
    state = FollowingState(
        adapter=follower.engine,
        share=Share(rank=follower.group.rank, num_ranks=follower.group.size),
        gather=follower.group.beside.all_gather_rows,
        files=SlotFiles(open_io(io)[0], throttle=throttle),
        counters=Counters(),
    )
    follower.state = state
    follower.engine.model().qkv_input_tap = state
    follower.at_end.append(state.stop)
    start_answering(follower.io, state.answer)


def _obey(follower: Follower, order: object) -> None:
    assert follower.state is not None, "an order came before state was opened"
    follower.state.obey(order)


register(OPEN, _open)
register(ORDER, _obey)
