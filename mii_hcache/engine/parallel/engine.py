"""ParallelEngine: the engine of rank 0. It tells the other ranks what it is about to do, and does it with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from mii_hcache.engine.parallel.commands import STOP, CommandStream
from mii_hcache.engine.parallel.followers import Followers
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.engine.sequence_blocks import SequenceBlocks
from mii_hcache.errors import HCacheError, RankLostError
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.streams import Stream


class ParallelBlocks(SequenceBlocks):
    """The blocks of one sequence on every rank. Rows are each rank's own to bring (`ParallelEngine.own`): written here
    they would leave the others' blocks empty, so that is refused."""

    _engine: ParallelEngine

    def __init__(self, engine: ParallelEngine, uid: int) -> None:
        super().__init__(engine, uid)
        self.uid = uid

    def fill(self, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        with self._engine.telling("fill", self.uid, start, token_ids.tolist(), num_layers):
            super().fill(start, token_ids, num_layers)

    def project_hidden(self, layer_idx: int, start: int, hidden: torch.Tensor) -> None:
        raise HCacheError("rows of one rank cannot be projected alone")

    def write_kv(self, layer_idx: int, start: int, kv: torch.Tensor, stream: Stream) -> None:
        raise HCacheError("K and V of one rank cannot be written alone")

    def read_kv(self, layer_idx: int, start: int, out: torch.Tensor) -> None:
        raise HCacheError("K and V of one rank cannot be read alone")

    def gather_kv(self, layers: Sequence[int], start: int, out: torch.Tensor) -> None:
        raise HCacheError("K and V of one rank cannot be read alone")

    def commit(self, num_tokens: int) -> None:
        self._check_commit()
        with self._engine.telling("commit", self.uid, num_tokens):
            super().commit(num_tokens)


class OwnRank:
    """Rank 0's share alone (`runtime.ports.EngineAdapter`): its targets reach no other rank. All else is the
    engine's."""

    def __init__(self, engine: ParallelEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def target(self, uid: int) -> SequenceBlocks:
        """See `EngineAdapter.target`."""
        return SequenceBlocks(self._engine, uid)


class ParallelEngine(HCacheEngine):
    """A whole model over several ranks, as one engine. Engine thread only.

    What can be refused is refused before anybody is told. What fails afterwards has left the ranks in different states:
    the engine is lost then, and every further call raises RankLostError.
    """

    followers: Followers
    _stream: CommandStream

    def lead(self, followers: Followers) -> None:
        """All ranks have loaded: from here on they follow."""
        self.followers = followers
        self._stream = CommandStream(followers.command_links, followers.check)
        self._model.logits_via = self._logits

    def tell(self, name: str, *arguments: Any) -> None:
        """Have the other ranks do what `name` stands for (`commands.register`). Raises RankLostError."""
        self._stream.tell(self.allocator.digest, name, *arguments)

    @contextmanager
    def telling(self, name: str, *arguments: Any) -> Iterator[None]:
        """Tell, then do the same here within the block. An error there is the end of the engine."""
        self.tell(name, *arguments)
        try:
            yield
        except Exception as error:
            raise self.followers.lose(f"rank 0 failed in {name!r}: {error}", error) from error

    def reserve(self, uid: int, num_tokens: int) -> None:
        self._check_reserve(uid, num_tokens)
        with self.telling("reserve", uid, num_tokens):
            super().reserve(uid, num_tokens)

    def truncate(self, uid: int, num_tokens: int) -> None:
        self._check_truncate(uid, num_tokens)
        with self.telling("truncate", uid, num_tokens):
            super().truncate(uid, num_tokens)

    def evict(self, uid: int) -> None:
        with self.telling("evict", uid):
            super().evict(uid)

    def poison_free_blocks(self) -> None:
        with self.telling("poison"):
            super().poison_free_blocks()

    def target(self, uid: int) -> SequenceBlocks:
        return ParallelBlocks(self, uid)

    @torch.inference_mode()
    def put(
        self, batch_uids: Iterable[int], batch_tokens: Iterable[torch.Tensor], do_checks: bool = True
    ) -> torch.Tensor:
        uids, tokens = list(batch_uids), list(batch_tokens)
        self._check_put(uids, tokens)
        with self.telling("put", uids, [token_ids.tolist() for token_ids in tokens]):
            return super().put(uids, tokens)

    def _logits(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The others know no more than that the layers ran: they wait to hear of which rows logits are wanted."""
        self.tell("logits", rows.tolist())
        return self._model.joined_logits(output, rows)  # type: ignore[no-any-return]

    @property
    def rank_states(self) -> dict[int, str]:
        return self.followers.states()

    @property
    def lost(self) -> RankLostError | None:
        return self.followers.error

    def lose(self, error: RankLostError) -> RankLostError:
        return self.followers.lose(str(error), error)

    @property
    def own(self) -> EngineAdapter:
        return OwnRank(self)

    def close(self) -> None:
        """Let the other ranks end, and leave their group; returns when they are gone. Idempotent."""
        self.followers.let_go()
        with suppress(RankLostError):
            self.tell(STOP)
        self.followers.end()
        assert self.group is not None
        self.group.close()
