"""Where new spans go in segment files, and what has to leave for them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from mii_hcache.core.layout import SpanLayout
from mii_hcache.errors import ConfigError
from mii_hcache.storage.format import slot_counts, slot_sizes
from mii_hcache.storage.index import FileIndex
from mii_hcache.storage.segments import Segments
from mii_hcache.storage.slots import Place

_FULL_DISK_PAUSE_S = 5.0
"""After the disk said that it is full, spans only replace others for so long."""

_RELIEF_BYTES = 4 << 20
"""What is evicted when the catalog finds no room on the disk: as much as SQLite's log may take."""


_EASE_PAUSE_S = 1.0
"""After nothing could be evicted in the background, it is not tried for so long."""


@dataclass(frozen=True, kw_only=True)
class Watermarks:
    """Shares of the capacity: above `high`, spans are evicted in the background until no more than `low` is used."""

    high: float = 0.95
    low: float = 0.90

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise ConfigError(f"watermarks must be 0 < low <= high <= 1, got {self.low} and {self.high}")


class Room:
    """Finds slots: free ones first, then growth of the files, then holes in place of other sizes, then eviction.

    Any thread. Methods block on I/O where they punch holes or wait for the catalog.
    """

    def __init__(
        self,
        index: FileIndex,
        segments: Segments,
        commit_deletions: Callable[[], bool],
        watermarks: Watermarks | None = None,
    ) -> None:
        """`commit_deletions` deletes removed spans' rows, so that their slots become free; False when it cannot.
        `watermarks` None: `ease` does nothing."""
        self._index = index
        self._segments = segments
        self._commit_deletions = commit_deletions
        self._can_punch = True
        self._full_until_s = 0.0
        self._watermarks = watermarks
        self._ease_due_s = 0.0

    def reserve(self, layout: SpanLayout) -> list[Place] | None:
        """Take a slot for each chunk of a span, evicting as needed. None when no room can be made; then nothing was
        evicted for it, unless others took the room first.

        All slots are taken at once, whatever their sizes: nobody holds some while it waits for others, and a loop that
        finds its room taken was overtaken by a span that got in.
        """
        wanted = slot_counts(layout)
        pool = self._index.pool
        if not pool.fits(wanted):
            return None
        while True:
            may_grow = time.monotonic() >= self._full_until_s
            with self._index.lock:
                taken = pool.take(wanted, may_grow=may_grow)
                if taken is not None:
                    for number in {place.segment for places in taken.values() for place in places}:
                        self._segments.add(number, *pool.shape(number))
                    next_of_size = {size: iter(places) for size, places in taken.items()}
                    return [next(next_of_size[size]) for size in slot_sizes(layout)]
                missing_bytes, missing_slots = pool.missing_bytes(wanted), pool.missing_slots(wanted)
                spare = pool.take_spare(wanted, missing_bytes) if may_grow and self._can_punch else []
            if spare:
                self.erase(spare)
                continue
            with self._index.lock:
                self._index.counters.put_waits += 1
            is_evicted = self._evict(missing_bytes) if may_grow else self._index.evict_slots(missing_slots)
            if not is_evicted or not self._commit_deletions():
                return None

    @property
    def is_tight(self) -> bool:
        """Whether `ease` has something to do."""
        if self._watermarks is None or time.monotonic() < self._ease_due_s:
            return False
        with self._index.lock:
            return self._index.pool.used_bytes > self._watermarks.high * self._index.pool.capacity_bytes

    def ease(self) -> None:
        """Evict from the high watermark down to the low one, for puts to come: for a thread that nobody waits for."""
        if not self.is_tight:
            return
        assert self._watermarks is not None
        with self._index.lock:
            pool = self._index.pool
            excess_bytes = pool.used_bytes - int(self._watermarks.low * pool.capacity_bytes)
        if not self._index.evict(excess_bytes, ahead=True) or not self._commit_deletions():
            self._ease_due_s = time.monotonic() + _EASE_PAUSE_S

    def erase(self, places: list[Place]) -> None:
        """Give taken places back: their bytes to the disk where it can, else as free slots."""
        if places:
            is_blank = False
            with contextlib.suppress(OSError):  # this time; it says nothing about what the file system can do
                is_blank = self._can_punch = self._can_punch and self._segments.punch(places)
            with self._index.lock:
                self._index.pool.give(places, blank=is_blank)

    def give_back(self, places: list[Place]) -> None:
        """Give taken places back as free slots."""
        with self._index.lock:
            self._index.pool.give(places)

    def pause_growth(self) -> None:
        """The disk is full: only replace other spans for a while."""
        self._full_until_s = time.monotonic() + _FULL_DISK_PAUSE_S

    def relieve(self) -> None:
        """The disk is too full even for the catalog's log, which has to say what was evicted before slots are reused:
        evict a little, and give back the bytes of all that is free or evicted. A row may then name a hole, which is
        as good as damage, so a crash costs nothing else."""
        self.pause_growth()
        with self._index.lock:
            relief_bytes = min(_RELIEF_BYTES, self._index.pool.disk_bytes // 16)
        self._index.evict(relief_bytes)
        with contextlib.suppress(OSError):
            if self._segments.punch(self._index.dead_places()):
                with self._index.lock:
                    free = self._index.pool.take_all_free()
                self.erase(free)

    def shrink(self) -> None:
        """Give all free bytes back to the disk, and evict until the files fit the capacity. For opening: no other
        thread may use the store yet."""
        pool = self._index.pool
        while True:
            self.erase(pool.take_all_free())
            excess_bytes = pool.disk_bytes - pool.capacity_bytes
            if excess_bytes <= 0 or not self._evict(excess_bytes) or not self._commit_deletions():
                break
        self._commit_deletions()

    def _evict(self, num_bytes: int) -> bool:
        """Evict spans; False when that cannot make room."""
        if self._index.evict(num_bytes):
            return True
        # Without holes a slot's bytes come back only with its whole file: go on while there is anything to evict.
        return not self._can_punch and self._index.evict(1)
