"""Host memory that the device still copies from."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from mii_hcache.runtime.streams import Event

_log = logging.getLogger(__name__)


class HeldMemory:
    """Each piece goes back to where it came from when the device has copied it. Engine thread only."""

    def __init__(self) -> None:
        self._held: deque[tuple[Event, Callable[[], None]]] = deque()
        """In the order of the copies."""

    def __len__(self) -> int:
        """Pieces that have not gone back."""
        return len(self._held)

    def give_back(self, release: Callable[[], None], copied: Event | None) -> None:
        """A piece is needed no longer than until `copied`, which comes after those of earlier calls: `release` is
        called then, by a later `collect`. None: at once, nothing copies from it."""
        if copied is None:
            release()
        else:
            self._held.append((copied, release))

    def collect(self) -> None:
        """Give back what the device has copied. Does not block; to be called now and then."""
        while self._held and self._held[0][0].is_done:
            self._held.popleft()[1]()

    def stop(self) -> None:
        """Give everything back, as soon as the device has copied it. When the device has failed, memory that it copies
        from stays as it is."""
        try:
            while self._held:
                self._held[0][0].synchronize()
                self.collect()
        except RuntimeError:
            _log.exception("the device did not say that it has copied %d pieces of memory", len(self._held))
