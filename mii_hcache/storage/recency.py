"""Order of use: least recently used goes first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

TICKS_PER_S = 1_000_000
_JUST_NOW = TICKS_PER_S
"""Uses of what was used last, this soon after one another, are one."""
FIRST_CLOCK_TICK = 1_000_000_000 * TICKS_PER_S
"""September 2001. Smaller ticks are counts of uses, from before ticks were times."""


class Recency:
    """Order of use over keys that have parents, and pins. Not thread-safe: the owner's lock covers it. No I/O.

    Use of a key is use of every key before it on its chain: a span without its ancestors restores nothing. So among
    equally recent keys the deeper ones come first, and a chain goes from its end.

    A tick is when a key was used: microseconds since 1970, at least one more than the tick before. Ticks outlive the
    process, so that what was not used for long is known after a restart, too.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        """`clock`: seconds since 1970; None is the machine's."""
        self._clock = clock or time.time
        self._tick = 0
        """The last one."""
        self._order: OrderedDict[bytes, tuple[bytes | None, int]] = OrderedDict()
        self._ticks: dict[bytes, int] = {}
        self._pins: dict[bytes, int] = {}
        self._moved: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)

    def load(self, entries: Iterable[tuple[bytes, bytes | None, int, int]]) -> None:
        """Add `(key, parent, depth, tick)` as they were when saved. Mere counts become times: just before now."""
        loaded = sorted(entries, key=lambda entry: (entry[3], -entry[2]))
        first_tick = self._now() - len(loaded)
        for idx, (key, parent, depth, tick) in enumerate(loaded):
            if tick < FIRST_CLOCK_TICK:
                tick = first_tick + idx
                self._moved.add(key)
            self._order[key] = (parent, depth)
            self._ticks[key] = tick
            self._tick = max(self._tick, tick)

    def add(self, key: bytes, parent: bytes | None, depth: int) -> None:
        """Add a key as just used."""
        self._order[key] = (parent, depth)
        self.use([key])

    def use(self, keys: Iterable[bytes]) -> None:
        """Mark keys and their ancestors as just used, all equally; unknown keys are ignored."""
        now = self._now()
        known = [key for key in keys if key in self._order]
        if now < self._tick + _JUST_NOW and all(self._ticks.get(key) == self._tick for key in known):
            return  # nothing was used since these were, and with them all before them
        path: set[bytes] = set()
        for key in known:
            step: bytes | None = key
            while step is not None and step not in path and step in self._order:
                path.add(step)
                step = self._order[step][0]
        self._tick = max(self._tick + 1, now)
        for key in sorted(path, key=lambda key: -self._order[key][1]):
            self._order.move_to_end(key)
            self._ticks[key] = self._tick
            self._was_used(key)
        self._moved |= path

    def remove(self, key: bytes) -> None:
        """Forget a key; its pins stay until they are undone."""
        del self._order[key]
        del self._ticks[key]
        self._moved.discard(key)

    def tick_of(self, key: bytes) -> int:
        """When the key was used last."""
        return self._ticks[key]

    def take_moved(self) -> list[tuple[bytes, int]]:
        """Keys used since the last call, with their ticks."""
        moved = [(key, self._ticks[key]) for key in self._moved]
        self._moved.clear()
        return moved

    def note_moved(self, keys: Iterable[bytes]) -> None:
        """What `take_moved` gave was not written."""
        self._moved.update(key for key in keys if key in self._order)

    def pin(self, keys: Iterable[bytes]) -> None:
        """Keep keys out of `victims` and `unused_since`; counted."""
        for key in keys:
            self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, keys: Iterable[bytes]) -> None:
        """Undo one `pin` of each key; keys that are not pinned are ignored."""
        for key in keys:
            count = self._pins.get(key, 0)
            if count > 1:
                self._pins[key] = count - 1
            else:
                self._pins.pop(key, None)

    def victims(self) -> Iterator[bytes]:
        """Keys that may go, in the order in which they should. Do not change the order while iterating."""
        return (key for key in self._order if key not in self._pins)

    def unused_since(self, since_s: float) -> list[bytes]:
        """Keys that may go and were last used before `since_s`, seconds since 1970: a walk over these, not over all."""
        unused = []
        for key in self._order:
            if self._ticks[key] >= since_s * TICKS_PER_S:
                break
            if key not in self._pins:
                unused.append(key)
        return unused

    def _was_used(self, key: bytes) -> None:
        """For orders that know more than this one."""

    def _now(self) -> int:
        return int(self._clock() * TICKS_PER_S)
