"""Which spans go first when room is needed: one interface for every store, and its two orders."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from mii_hcache.storage.recency import TICKS_PER_S, Recency

Loss = Callable[[int], float]
"""Seconds that a restore loses when the span at this position of a history is not there; of any unit, as only ratios
count."""
BytesOf = Callable[[bytes], int]

_STEPS = 2
"""Classes of value per doubling: spans in one class differ by less than a half."""
_LEAST_AGE = TICKS_PER_S
"""A second: younger spans are equally young."""
_AGE_POWER = 2
"""How fast the chance of being used again falls with age: more than 1, as most pauses are minutes and few are days."""
_MAX_BRANCHES = 64


class EvictionOrder(Protocol):
    """In which order spans go, and which may not. The owner's lock covers it; no I/O. `Recency` says what each does."""

    def load(self, entries: Iterable[tuple[bytes, bytes | None, int, int]]) -> None: ...
    def add(self, key: bytes, parent: bytes | None, depth: int) -> None: ...
    def use(self, keys: Iterable[bytes]) -> None: ...
    def remove(self, key: bytes) -> None: ...
    def tick_of(self, key: bytes) -> int: ...
    def take_moved(self) -> list[tuple[bytes, int]]: ...
    def note_moved(self, keys: Iterable[bytes]) -> None: ...
    def pin(self, keys: Iterable[bytes]) -> None: ...
    def unpin(self, keys: Iterable[bytes]) -> None: ...
    def victims(self) -> Iterator[bytes]: ...
    def unused_since(self, since_s: float) -> list[bytes]: ...
    def weigh(self, loss: Loss) -> None:
        """What it costs not to have a span, from now on. Orders that do not care ignore it."""
        ...


class Lru(Recency):
    """Least recently used first, whatever it is worth; a chain from its end."""

    def weigh(self, loss: Loss) -> None:
        """Nothing is weighed here."""


class CostAware(Recency):
    """Least worth first: what a span saves, per byte, times how likely it is used again.

    The longer a span lay unused, the less likely it is used again, and one that several histories go on from has as
    many chances: value = branches * loss(depth) / bytes / age ** 2 (after hyperbolic caching, Blankstein et al., ATC
    '17). It changes with time, and not in step for all, so spans lie in classes of about equal value but for their age,
    each in order of use: the least is at the head of some class. Using a span takes constant time, finding the next
    victim a look at a heap of the classes, of which there are a few dozen at most.

    Of spans of one history, used together, those that save less go first: with attention to pay for, that is the
    head, which whoever restores the tail must be able to fill in by computing it. Until `weigh` says what things cost,
    all bytes are worth the same, and a chain goes from its end.
    """

    def __init__(self, bytes_of: BytesOf, clock: Callable[[], float] | None = None) -> None:
        """`bytes_of`: a held key's bytes; asked when a key is added, and when it is weighed anew."""
        super().__init__(clock)
        self._bytes_of = bytes_of
        self._loss: Loss | None = None
        self._log_losses: list[float] = []
        """By depth, as far as they were asked for. Logarithms are to base 2."""
        self._classes: dict[int, OrderedDict[bytes, None]] = {}
        self._class_of: dict[bytes, int] = {}
        self._log_bytes: dict[bytes, float] = {}
        self._children: dict[bytes, int] = {}
        """How many spans follow one that is held, where there are any."""
        self._branches: dict[bytes, int] = {}
        """Histories that go through a span that is held, where there is more than one."""

    def load(self, entries: Iterable[tuple[bytes, bytes | None, int, int]]) -> None:
        entries = list(entries)
        super().load(entries)
        for _, parent, _, _ in entries:
            self._follow(parent)
        for key in self._order:
            self._log_bytes[key] = math.log2(max(1, self._bytes_of(key)))
            self._classify(key)

    def add(self, key: bytes, parent: bytes | None, depth: int) -> None:
        self._order[key] = (parent, depth)
        self._log_bytes[key] = math.log2(max(1, self._bytes_of(key)))
        self._follow(parent)
        self.use([key])

    def remove(self, key: bytes) -> None:
        parent = self._order[key][0]
        super().remove(key)
        if parent in self._children:
            self._follow(parent, -1)
        del self._log_bytes[key]
        del self._classes[self._class_of.pop(key)][key]
        self._children.pop(key, None)
        self._branches.pop(key, None)

    def victims(self) -> Iterator[bytes]:
        now = self._now()
        heads: list[tuple[float, int, bytes, Iterator[bytes]]] = []

        def push(value_class: int, rest: Iterator[bytes]) -> None:
            for key in rest:
                if key not in self._pins:
                    age = max(_LEAST_AGE, now - self._ticks[key])
                    heapq.heappush(heads, (value_class / _STEPS - _AGE_POWER * math.log2(age), value_class, key, rest))
                    return

        for value_class, keys in self._classes.items():
            push(value_class, self._in_class(keys))
        while heads:
            _, value_class, key, rest = heapq.heappop(heads)
            yield key
            push(value_class, rest)

    def weigh(self, loss: Loss) -> None:
        self._loss = loss
        self._log_losses.clear()
        self._classes.clear()
        self._class_of.clear()
        for key in self._order:
            self._classify(key)

    def _in_class(self, keys: OrderedDict[bytes, None]) -> Iterator[bytes]:
        """Oldest first; of those used together the first one of a history, once it is known that it is worth less."""
        if self._loss is None:
            yield from keys
            return
        together: list[bytes] = []
        for key in keys:
            if together and self._ticks[key] != self._ticks[together[0]]:
                yield from reversed(together)
                together.clear()
            together.append(key)
        yield from reversed(together)

    def _was_used(self, key: bytes) -> None:
        self._classify(key)

    def _follow(self, parent: bytes | None, num: int = 1) -> None:
        """`num` more spans follow `parent`: as many more histories go through all before it, but for the first one.
        What that is worth counts from the next use on."""
        if parent is None or parent not in self._order:
            return
        was_followed = self._children.get(parent, 0)
        self._children[parent] = was_followed + num
        if min(was_followed, was_followed + num) == 0:
            return
        seen: set[bytes] = set()
        step: bytes | None = parent
        while step is not None and step in self._order and step not in seen:
            seen.add(step)
            self._branches[step] = self._branches.get(step, 1) + num
            step = self._order[step][0]

    def _classify(self, key: bytes) -> None:
        """Put a key in the class of its value, as the one used last there."""
        log_value = self._log_loss_at(self._order[key][1]) - self._log_bytes[key]
        branches = self._branches.get(key, 1)
        if branches > 1:
            log_value += math.log2(min(branches, _MAX_BRANCHES))
        value_class = round(_STEPS * log_value)
        known = self._class_of.get(key)
        if known == value_class:
            self._classes[known].move_to_end(key)
            return
        if known is not None:
            del self._classes[known][key]
        self._class_of[key] = value_class
        self._classes.setdefault(value_class, OrderedDict())[key] = None

    def _log_loss_at(self, depth: int) -> float:
        if self._loss is None:
            return 0.0
        while depth >= len(self._log_losses):
            # Something is always lost, and no span is worth infinitely much more than its neighbour.
            self._log_losses.append(math.log2(max(1e-9, self._loss(len(self._log_losses)))))
        return self._log_losses[depth]


def order_named(name: str, bytes_of: BytesOf) -> EvictionOrder:
    """The order of this name; `bytes_of` a key's bytes."""
    return CostAware(bytes_of) if name == "cost" else Lru()
