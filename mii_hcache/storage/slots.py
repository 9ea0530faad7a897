"""Which slots of which segments are taken, and how many bytes the files occupy."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

from mii_hcache.storage.format import BLOCK_BYTES, SlotCounts

MAX_SLOTS = 1 << 24
"""Slots per segment."""
MAX_SEGMENT = (1 << 31) - 1
"""Highest number of a segment that is believed: far above all that a store ever makes, far below what a place holds."""


class Place(NamedTuple):
    """Where a chunk lies."""

    segment: int
    """Number of the segment file."""
    slot: int


class Run(NamedTuple):
    """Neighbouring slots `[start, stop)` of one segment."""

    segment: int
    start: int
    stop: int


class Places(Sequence[Place]):
    """The places of a span's chunks, packed: a large store keeps millions of them in memory. Immutable."""

    __slots__ = ("_words",)

    def __init__(self, places: Iterable[tuple[int, int]] = ()) -> None:
        self._words = array("I", itertools.chain.from_iterable(places))

    def __len__(self) -> int:
        return len(self._words) // 2

    @overload
    def __getitem__(self, idx: int) -> Place: ...
    @overload
    def __getitem__(self, idx: slice) -> list[Place]: ...
    def __getitem__(self, idx: int | slice) -> Place | list[Place]:
        if isinstance(idx, slice):
            return list(self)[idx]
        segment, slot = self._words[2 * idx : 2 * idx + 2]
        return Place(segment, slot)

    def __iter__(self) -> Iterator[Place]:
        words = iter(self._words)
        return map(Place, words, words)

    def runs(self) -> list[Run]:
        """The same slots as runs, in order; most spans are one, or one per kind."""
        runs: list[Run] = []
        segment = start = stop = -1
        for next_segment, slot in zip(self._words[::2], self._words[1::2], strict=True):
            if slot == stop and next_segment == segment:
                stop += 1
                continue
            if stop > start:
                runs.append(Run(segment, start, stop))
            segment, start, stop = next_segment, slot, slot + 1
        if stop > start:
            runs.append(Run(segment, start, stop))
        return runs


class SlotSet:
    """Some slots of one segment, a byte each."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self.num = 0

    def add(self, start: int, stop: int) -> bool:
        """Add slots `[start, stop)`. False, and nothing added, when one of them was in already."""
        if self._bytes.find(1, start, stop) >= 0:
            return False
        self._bytes.extend(bytes(max(0, stop - len(self._bytes))))
        self._bytes[start:stop] = b"\1" * (stop - start)
        self.num += stop - start
        return True

    def __contains__(self, slot: int) -> bool:
        return slot < len(self._bytes) and self._bytes[slot] == 1

    @property
    def stop(self) -> int:
        """One more than the highest slot."""
        return len(self._bytes)


@dataclass(kw_only=True)
class _Shelf:
    """A segment's slots: taken, free (on disk, may be overwritten) or blank (not on disk: a hole or past the end)."""

    number: int
    slot_bytes: int
    num_slots: int
    num_taken: int = 0
    free: list[int] = field(default_factory=list)
    """Heap."""
    blank: list[int] = field(default_factory=list)
    """Heap of blank slots below `fresh`."""
    fresh: int = 0
    """First of the slots that never were used."""

    @property
    def num_blank(self) -> int:
        return len(self.blank) + self.num_slots - self.fresh

    @property
    def disk_bytes(self) -> int:
        return BLOCK_BYTES + (self.num_taken + len(self.free)) * self.slot_bytes

    def grow(self) -> int:
        if self.blank:
            return heapq.heappop(self.blank)
        self.fresh += 1
        return self.fresh - 1


class SlotPool:
    """Bookkeeping of slots under a bound on disk bytes. No I/O. Not thread-safe: the owner's lock covers it.

    `disk_bytes` and the bound count what files occupy: a header per segment, and every slot that is taken or free.
    A span may need slots of several sizes: all are taken at once or none, so that nobody waits holding some. Free slots
    of one size serve another size only after their bytes were given back to the disk (`take_spare`, punch,
    `give(..., blank=True)`), so that the bound holds at every moment.
    """

    def __init__(self, capacity_bytes: int, segment_bytes: int, numbers: Sequence[int] | None = None) -> None:
        """`segment_bytes`: largest size of a new segment (at least one slot). `numbers`: those that segments may have,
        used again; then no segment may be larger. None: every segment has a new one."""
        self.capacity_bytes = capacity_bytes
        self._segment_bytes = segment_bytes
        self._numbers = None if numbers is None else set(numbers)
        self._shelves: dict[int, _Shelf] = {}
        self._next_number = 1
        self._leaving_bytes = 0
        self._leaving: list[int] = []

    @property
    def disk_bytes(self) -> int:
        """Bytes that the segment files occupy, at most."""
        return self._leaving_bytes + sum(shelf.disk_bytes for shelf in self._shelves.values())

    @property
    def used_bytes(self) -> int:
        """Of `disk_bytes`, those that are not free to be overwritten."""
        return self.disk_bytes - sum(len(shelf.free) * shelf.slot_bytes for shelf in self._shelves.values())

    def reserve_number(self, number: int) -> None:
        """Never use this segment number, or a smaller one, for a new segment."""
        self._next_number = max(self._next_number, number + 1)

    def add_segment(self, number: int, slot_bytes: int, num_slots: int, taken: SlotSet, num_written: int) -> None:
        """Know an existing segment: `taken` slots hold chunks, other slots below `num_written` are free."""
        self.reserve_number(number)
        if self._numbers is not None:
            self._numbers.discard(number)
        fresh = max(num_written, taken.stop)
        self._shelves[number] = _Shelf(
            number=number,
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            num_taken=taken.num,
            free=[slot for slot in range(fresh) if slot not in taken],
            fresh=fresh,
        )

    def shape(self, number: int) -> tuple[int, int]:
        """`(slot_bytes, num_slots)` of a segment."""
        shelf = self._shelves[number]
        return shelf.slot_bytes, shelf.num_slots

    def fits(self, wanted: SlotCounts) -> bool:
        """Whether an empty store could hold these slots."""
        needed_bytes = sum(num * size + self._header_bytes(size, num) for size, num in wanted.items())
        if self._numbers is not None:
            if any(size + BLOCK_BYTES > self._segment_bytes for size in wanted):
                return False
            if self._num_segments(wanted) > len(self._numbers) + len(self._shelves) + len(self._leaving):
                return False
        return needed_bytes <= self.capacity_bytes

    def missing_bytes(self, wanted: SlotCounts) -> int:
        """Disk bytes that must be given up before `take` can succeed; at most 0 when it can. One byte stands for a
        segment, where no number is left for a new one."""
        grown_bytes = 0
        new: dict[int, int] = {}
        for size, num in self.missing_slots(wanted).items():
            new[size] = max(0, num - sum(shelf.num_blank for shelf in self._of_size(size)))
            grown_bytes += num * size + self._header_bytes(size, new[size])
        excess_bytes = grown_bytes - (self.capacity_bytes - self.disk_bytes) if grown_bytes else 0
        is_short = self._numbers is not None and self._num_segments(new) > len(self._numbers)
        return max(excess_bytes, 1) if is_short else excess_bytes

    def missing_slots(self, wanted: SlotCounts) -> SlotCounts:
        """Those of `wanted` that do not lie free on disk; empty when `take` can do without growth."""
        return {size: num - self.num_free(size) for size, num in wanted.items() if num > self.num_free(size)}

    def num_free(self, slot_bytes: int) -> int:
        """Slots of this size that lie on disk and may be overwritten."""
        return sum(len(shelf.free) for shelf in self._of_size(slot_bytes))

    def take(self, wanted: SlotCounts, *, may_grow: bool = True) -> dict[int, list[Place]] | None:
        """Take slots, by size, free ones first; all or None. Without `may_grow`, free ones only."""
        if self.missing_bytes(wanted) > 0 or (not may_grow and self.missing_slots(wanted)):
            return None
        return {size: self._take(size, num) for size, num in wanted.items()}

    def take_spare(self, wanted: SlotCounts, num_bytes: int) -> list[Place]:
        """Take free slots that `wanted` has no use for, about `num_bytes` of them: to be punched and given back as
        blank."""
        places: list[Place] = []
        useful = dict(wanted)
        for shelf in self._shelves.values():
            num_useful = min(len(shelf.free), useful.get(shelf.slot_bytes, 0))
            if num_useful:
                useful[shelf.slot_bytes] -= num_useful
            while len(shelf.free) > num_useful and num_bytes > 0:
                places.append(self._place(shelf, heapq.heappop(shelf.free)))
                num_bytes -= shelf.slot_bytes
        return places

    def take_all_free(self) -> list[Place]:
        """Take every free slot: to be punched and given back as blank."""
        places = []
        for shelf in self._shelves.values():
            while shelf.free:
                places.append(self._place(shelf, heapq.heappop(shelf.free)))
        return places

    def give(self, places: Iterable[Place], *, blank: bool = False) -> None:
        """Give slots back: free, or blank when the disk holds nothing there any more."""
        for number, slot in places:
            shelf = self._shelves[number]
            shelf.num_taken -= 1
            heapq.heappush(shelf.blank if blank else shelf.free, slot)

    def take_empty(self) -> list[int]:
        """Remove segments that hold nothing; their files are to be deleted, then `forget_bytes` called. Returns their
        numbers."""
        empty = [number for number, shelf in self._shelves.items() if shelf.num_taken == 0]
        for number in empty:
            self._leaving_bytes += self._shelves.pop(number).disk_bytes
        self._leaving += empty
        return empty

    def forget_bytes(self) -> None:
        """The segments of `take_empty` are gone."""
        self._leaving_bytes = 0
        leaving, self._leaving = self._leaving, []
        if self._numbers is not None:
            self._numbers.update(leaving)

    def _take(self, slot_bytes: int, num: int) -> list[Place]:
        places: list[Place] = []
        for shelf in self._of_size(slot_bytes):
            while shelf.free and len(places) < num:
                places.append(self._place(shelf, heapq.heappop(shelf.free)))
        for shelf in self._of_size(slot_bytes):
            while shelf.num_blank and len(places) < num:
                places.append(self._place(shelf, shelf.grow()))
        while len(places) < num:
            shelf = self._new_shelf(slot_bytes)
            while shelf.num_blank and len(places) < num:
                places.append(self._place(shelf, shelf.grow()))
        return places

    def _of_size(self, slot_bytes: int) -> list[_Shelf]:
        return [shelf for shelf in self._shelves.values() if shelf.slot_bytes == slot_bytes]

    def _header_bytes(self, slot_bytes: int, num: int) -> int:
        """Bytes of the headers of new segments for `num` slots."""
        return -(-num // self._slots_per_segment(slot_bytes)) * BLOCK_BYTES

    def _num_segments(self, slots: SlotCounts) -> int:
        return sum(-(-num // self._slots_per_segment(size)) for size, num in slots.items())

    def _slots_per_segment(self, slot_bytes: int) -> int:
        return min(MAX_SLOTS, max(1, (self._segment_bytes - BLOCK_BYTES) // slot_bytes))

    def _new_shelf(self, slot_bytes: int) -> _Shelf:
        if self._numbers is not None:
            number = min(self._numbers)
            self._numbers.remove(number)
        else:
            number, self._next_number = self._next_number, self._next_number + 1
        num_slots = self._slots_per_segment(slot_bytes)
        shelf = _Shelf(number=number, slot_bytes=slot_bytes, num_slots=num_slots)
        self._shelves[number] = shelf
        return shelf

    def _place(self, shelf: _Shelf, slot: int) -> Place:
        shelf.num_taken += 1
        return Place(shelf.number, slot)
