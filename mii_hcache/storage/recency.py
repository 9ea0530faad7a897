"""In which order spans go when room is needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator


class Recency:
    """Order of use over keys that have parents, and pins. Not thread-safe: the owner's lock covers it. No I/O.

    Use of a key is use of every key before it on its chain: a span without its ancestors restores nothing. So among
    equally recent keys the deeper ones come first, and a chain goes from its end.
    """

    def __init__(self, first_tick: int = 1) -> None:
        """`first_tick`: above every tick that is added later with one."""
        self._tick = first_tick
        self._order: OrderedDict[bytes, tuple[bytes | None, int]] = OrderedDict()
        self._ticks: dict[bytes, int] = {}
        self._pins: dict[bytes, int] = {}
        self._moved: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)

    def load(self, entries: Iterable[tuple[bytes, bytes | None, int, int]]) -> None:
        """Add `(key, parent, depth, tick)` as they were when saved."""
        for key, parent, depth, tick in sorted(entries, key=lambda entry: (entry[3], -entry[2])):
            self._order[key] = (parent, depth)
            self._ticks[key] = tick
            self._tick = max(self._tick, tick + 1)

    def add(self, key: bytes, parent: bytes | None, depth: int) -> None:
        """Add a key as just used."""
        self._order[key] = (parent, depth)
        self.use([key])

    def use(self, keys: Iterable[bytes]) -> None:
        """Mark keys and their ancestors as just used, all equally; unknown keys are ignored."""
        path: set[bytes] = set()
        for key in keys:
            step: bytes | None = key
            while step is not None and step not in path and step in self._order:
                path.add(step)
                step = self._order[step][0]
        for key in sorted(path, key=lambda key: -self._order[key][1]):
            self._order.move_to_end(key)
            self._ticks[key] = self._tick
        self._moved |= path
        self._tick += 1

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

    def pin(self, keys: Iterable[bytes]) -> None:
        """Keep keys out of `victims`; counted."""
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
