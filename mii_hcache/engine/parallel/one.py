"""What an engine says of its ranks: here for one that has none but itself."""

from __future__ import annotations

from typing import cast

from mii_hcache.errors import RankLostError
from mii_hcache.runtime.ports import EngineAdapter


class OneProcess:
    """Comes before the host's engine in the bases; `ParallelEngine` says otherwise."""

    @property
    def rank_states(self) -> dict[int, str]:
        """What each rank does, by its number; empty where there is only this one."""
        return {}

    @property
    def lost(self) -> RankLostError | None:
        """Why this engine can never run again, where it is one of several ranks."""
        return None

    def lose(self, error: RankLostError) -> RankLostError:
        """A call failed for a lost rank: no other need be made. Returns why the engine is lost."""
        return error

    @property
    def own(self) -> EngineAdapter:
        """This process's share of the engine: what is written through its targets reaches no other rank."""
        return cast(EngineAdapter, self)

    def close(self) -> None:
        """Nothing runs on it any more. Idempotent."""
