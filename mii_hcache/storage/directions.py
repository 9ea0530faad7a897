"""Where chunks lie, for another process to read or write: with tensor parallelism each rank moves its own share.

One process owns a store: its catalog, its room, what is evicted. The others never open it. They are given directions,
follow them with `SlotFiles`, and tell the owner how it went; until then the slots are nobody else's.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.identity import SpanId
from mii_hcache.storage.format import SlotHeader
from mii_hcache.storage.records import ReadOutcome, SpanRecord


@dataclass(frozen=True, kw_only=True)
class ChunkWanted:
    """One chunk that somebody else will read; as `ChunkRead`."""

    span_id: SpanId
    layer_idx: int
    num_bytes: int
    kind: ChunkKind | None = None
    shard: int = 0
    num_shards: int = 1

    def chunk_of(self, record: SpanRecord) -> int | None:
        """As in `ChunkRead`."""
        return record.chunk_of(self.layer_idx, self.num_bytes, self.kind, self.shard, self.num_shards)


@dataclass(frozen=True, kw_only=True)
class SlotDirection:
    """A slot that holds a chunk. Small, and goes to other processes as it is."""

    path: str
    """Of its segment file."""
    offset: int
    """Where in it the slot starts."""
    header: SlotHeader
    """The only one that the slot may carry; the payload's length and checksum are in it."""


@dataclass(frozen=True, kw_only=True)
class PayloadDirection:
    """Where the bytes of a chunk go."""

    path: str
    offset: int
    """Where in it the payload starts."""
    num_bytes: int


class ReadDirections:
    """To the leading ones of the chunks that were asked for. Their slots hold what they hold until `end`."""

    def __init__(
        self,
        slots: Sequence[SlotDirection],
        reason: str | None,
        on_end: Callable[[ReadOutcome], None] = lambda outcome: None,
    ) -> None:
        self.slots = tuple(slots)
        self.reason = reason
        """Why there is no direction to the next one: `missing` or `unavailable`; None when there is one to each."""
        self._on_end = on_end
        self._lock = threading.Lock()
        self._is_open = True

    def end(self, outcome: ReadOutcome) -> None:
        """They were read, as far as `outcome` says, or nobody will: then `num_ok` 0 and no reason. A chunk that is
        `missing` or `corrupt` is forgotten with its span. Any thread; later calls do nothing."""
        with self._lock:
            was_open, self._is_open = self._is_open, False
        if was_open:
            self._on_end(outcome)


class JoinedDirections:
    """Directions to the chunks of one batch that lie in several stores. One thread."""

    def __init__(self, reason: str | None) -> None:
        """`reason`: why there is none to the first chunk that is in no store; None when all are in one."""
        self._reason = reason
        self._parts: list[tuple[Sequence[int], ReadDirections]] = []

    def add(self, idxs: Sequence[int], part: ReadDirections) -> None:
        """Chunks `idxs` of the batch, in order, are in one store."""
        self._parts.append((idxs, part))

    def join(self) -> ReadDirections:
        """All of them, up to the first chunk that its store has no direction to."""
        slots = {idx: slot for idxs, part in self._parts for idx, slot in zip(idxs, part.slots, strict=False)}
        num = next(idx for idx in range(len(slots) + 1) if idx not in slots)
        reason = self._reason
        for idxs, part in self._parts:
            if len(part.slots) < len(idxs) and idxs[len(part.slots)] == num:
                reason = part.reason
        return ReadDirections([slots[idx] for idx in range(num)], reason, self.end)

    def end(self, outcome: ReadOutcome) -> None:
        """Tell each store how its chunks fared; only one of them hears of a failure."""
        for idxs, part in self._parts:
            num_ok = sum(idx < outcome.num_ok for idx in idxs)
            failed = num_ok < len(idxs) and idxs[num_ok] == outcome.num_ok
            part.end(ReadOutcome(num_ok=num_ok, reason=outcome.reason if failed else None))


@dataclass(frozen=True, kw_only=True)
class Writer:
    """The one of several processes that writes most of a span, and reads it when it comes back."""

    idx: int
    num_writers: int


class SharedDraft(ABC):
    """Room for a span whose chunks several processes write. Belongs to its writer until it is published,
    dropped or abandoned. Any thread; methods block on I/O."""

    payloads: tuple[PayloadDirection, ...]
    """Of each chunk of the span."""

    @abstractmethod
    def write(self, chunks: Mapping[int, memoryview]) -> list[int]:
        """Write some chunks, by their index, from here; their CRC32Cs, in that order. Does not end it. Raises OSError:
        then what was written is unknown."""

    @abstractmethod
    def publish(self, crcs: Sequence[int]) -> bool:
        """All payloads are written, `crcs` being their CRC32Cs: make it a span. As `ChunkStore.put`; raises OSError,
        and then the room is given back."""

    @abstractmethod
    def drop(self, error: OSError | None = None) -> None:
        """Give the room back. Nobody writes there any more. `error`: why it could not be written, if it could not."""

    @abstractmethod
    def abandon(self) -> None:
        """Nobody knows whether somebody still writes there: leave the room alone for as long as this process lives.
        The next one finds it free."""
