"""What rank 0 says to the other ranks about saved state, and the ports through which it does.

Two ways lead to a follower. *Orders* come in the stream of all that happens to the engine and are carried out on its
engine thread, in order: they touch blocks. *Questions* come at any time, are answered from other threads, in any order,
and touch host memory and disks. A question may come before the order that it depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.plans import StoragePlan
from mii_hcache.errors import RankLostError
from mii_hcache.storage.directions import PayloadDirection, SlotDirection


class PeerLostError(RankLostError):
    """A rank is gone: what it was asked is never answered."""


class Peers(Protocol):
    """The other ranks, as rank 0 sees them."""

    @property
    def num_ranks(self) -> int:
        """All of them, rank 0 included."""
        ...

    def order(self, order: object) -> None:
        """Have all followers do this. Engine thread. Does not wait for them. Raises HCacheError when one is gone."""
        ...

    def ask(self, rank: int, question: object) -> Future[object]:
        """A follower's answer; PeerLostError when it is gone. Any thread; does not block for long. Questions come to a
        follower in the order in which they were asked."""
        ...


GatherRows = Callable[[torch.Tensor, torch.Tensor], None]
"""`gather(out, rows)`: rows `[n, ...]` of every rank, one behind the other, into out `[num_ranks * n, ...]`, on the
engine's device and the current stream. Engine thread, all ranks, in the same order."""


# --- orders: saving ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StartSaving:
    """Before everything else: what is saved of each span, and with which memory."""

    plan: StoragePlan
    max_batch_tokens: int
    save_wait: float
    ring_batches: int


@dataclass(frozen=True, kw_only=True)
class OpenSequence:
    """A sequence starts with so many tokens in its blocks."""

    uid: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class TruncateSequence:
    """It goes back to its first tokens."""

    uid: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class CloseSequence:
    """It leaves the engine."""

    uid: int


@dataclass(frozen=True, kw_only=True)
class BeginStep:
    """A ragged batch is about to run."""

    segments: tuple[tuple[int, int], ...]
    """(uid, number of tokens), in the order of the batch."""


@dataclass(frozen=True, kw_only=True)
class EndStep:
    """It ran: these of the spans that it made whole are saved, and no others."""

    puts: tuple[tuple[int, int, int], ...]
    """(uid, span_idx, put_id)."""


@dataclass(frozen=True, kw_only=True)
class AbortStep:
    """It failed."""


@dataclass(frozen=True, kw_only=True)
class HealSpan:
    """A span is read from its blocks and saved as K and V."""

    uid: int
    span_idx: int
    put_id: int


# --- questions: saving ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WritePart:
    """Write your chunks of a put. Answered by `Written`, `PartLost` or `Failed`, after which nothing is written."""

    put_id: int
    payloads: tuple[PayloadDirection, ...]


@dataclass(frozen=True, kw_only=True)
class DropPart:
    """Nobody will ask for a put's chunks, or waits for them any more. Answered by None."""

    put_id: int


@dataclass(frozen=True, kw_only=True)
class Written:
    """All is on the device, as far as the backend goes around the page cache."""

    crcs: tuple[int, ...]
    """CRC32C of each chunk that was asked for."""


@dataclass(frozen=True, kw_only=True)
class PartLost:
    """The rank has not got the rows: it had no room for them, or they were damaged on the way."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """It could not be done."""

    what: str
    errno: int | None = None
    """Of a disk that failed; None when it was something else."""


# --- restoring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReadPart:
    """A question: read your chunks of a tile into host memory. Answered by `ReadOutcome`, or `Failed`."""

    read_id: int
    slots: tuple[SlotDirection, ...]


@dataclass(frozen=True, kw_only=True)
class ForgetPart:
    """A question: a tile that was asked for will not be placed. Answered by None."""

    read_id: int


@dataclass(frozen=True, kw_only=True)
class OpenRestore:
    """An order: tiles come into the blocks of a sequence from now on, and nothing else behind what is filled."""

    uid: int
    tile_spans: int
    """Most spans of a tile."""
    is_urgent: bool
    """As in `Placer`."""


@dataclass(frozen=True, kw_only=True)
class JoinRestore:
    """An order: no more tiles come; what was placed comes before whatever the engine's own calls do from now on."""

    uid: int


@dataclass(frozen=True, kw_only=True)
class PlaceTile:
    """An order: launch what brings the first spans of a tile, which all ranks have read, into the blocks; then forget
    it. Between `OpenRestore` and `JoinRestore` of its sequence."""

    read_id: int
    uid: int
    layer_idx: int
    first_span: int
    num_spans: int
    kind: ChunkKind


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlaceRubbish:
    """An order: do what `PlaceTile` does, with rows that mean nothing, into the first blocks of a sequence."""

    uid: int
    layer_idx: int
    num_spans: int
    kind: ChunkKind


@dataclass(frozen=True, kw_only=True)
class GatherRubbish:
    """An order: gather as many rows of nothing as a tile of so many spans would."""

    num_spans: int


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A question: what a follower counted so far. Answered by a mapping of names to numbers."""
