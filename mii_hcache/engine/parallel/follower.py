"""A rank other than 0, as the commands that it carries out see it."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch

from mii_hcache.engine.parallel.group import RankGroup
from mii_hcache.engine.ragged_engine import HCacheEngine

if TYPE_CHECKING:
    from mii_hcache.runtime.following import FollowingState


class Follower:
    """What command handlers get: this rank's engine, group and line for storage requests."""

    def __init__(self, engine: HCacheEngine, group: RankGroup, io: Connection) -> None:
        self.engine = engine
        self.group = group
        self.io = io
        """The other end of `Followers.io_links`: for a thread of its own."""
        self.state: FollowingState | None = None
        """This rank's share of saved state (`parallel.state`)."""
        self.at_end: list[Callable[[], None]] = []
        """Called, last one first, when rank 0 says that it is over."""
        self._output: torch.Tensor | None = None
        engine.model().logits_via = self._keep_output

    def _keep_output(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The layers ran; which logits are wanted is told next. Nobody looks at them here."""
        self._output = output
        return output.new_empty(len(rows), 0)

    def run_logits(self, rows: list[int]) -> None:
        """This rank's part of the logits of the last batch's rows."""
        assert self._output is not None
        with torch.inference_mode():
            self.engine.model().joined_logits(self._output, torch.tensor(rows, device=self._output.device))
