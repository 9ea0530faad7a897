"""Whether the disk under a store answers."""

from __future__ import annotations

import errno
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)

AWAY_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ENODEV", "ENXIO", "ESTALE", "ETIMEDOUT", "ECANCELED", "EREMOTEIO", "ENOLINK", "ENOTCONN"),
        *("ESHUTDOWN", "EHOSTDOWN", "ENOMEDIUM"),
    )
)
"""What a write fails with when the device does, not its room or its rights."""
DEADLINE_S = 10.0
"""A disk that takes longer for one batch hangs."""
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 30.0
"""Before a disk that failed is tried again: at first, and at most."""
_WELL_S = 60.0
"""A disk that fails sooner than this after it came back goes on waiting where it was, so that it flaps ever slower."""


class Presence:
    """Here until an operation fails or hangs, then away until a probe succeeds. Thread-safe; nothing here does I/O
    except the probe, on a thread of its own.

    A disk hangs when an operation takes longer than `deadline_s`; it is not probed before that operation has ended.
    """

    def __init__(
        self,
        name: str,
        probe: Callable[[], None],
        *,
        deadline_s: float = DEADLINE_S,
        first_pause_s: float = FIRST_PAUSE_S,
        on_stall: Callable[[], None] = lambda: None,
        on_return: Callable[[], None] = lambda: None,
    ) -> None:
        """`probe` tries the disk and raises OSError when it fails still. `on_stall` may try to end what hangs, without
        blocking. `on_return` is called once the disk is here again."""
        self.deadline_s = deadline_s
        self._name = name
        self._probe = probe
        self._first_pause_s = first_pause_s
        self._on_stall = on_stall
        self._on_return = on_return
        self._changed = threading.Condition()
        """Guards what follows; what is read without it is one value."""
        self._started_s: dict[int, float] = {}
        """When the operations began that have not ended, oldest first."""
        self._next_number = 0
        self._stalls_at_s = math.inf
        self._is_away = False
        self._is_closed = False
        self._pause_s = first_pause_s
        self._well_since_s = -math.inf

    @property
    def is_here(self) -> bool:
        """Whether there is any use in asking the disk."""
        if self._is_away:
            return False
        if time.monotonic() <= self._stalls_at_s:
            return True
        self.stalled()
        return False

    @property
    def is_stuck(self) -> bool:
        """Whether an operation hangs now."""
        return time.monotonic() > self._stalls_at_s

    @contextmanager
    def operation(self) -> Iterator[None]:
        """Around everything that waits for the disk; what it raises as only a device does sends the disk away."""
        with self._changed:
            number = self._next_number
            self._next_number += 1
            self._started_s[number] = time.monotonic()
            self._note_oldest()
        try:
            yield
        except OSError as error:
            if error.errno in AWAY_ERRNOS:
                self.failed(error)
            raise
        finally:
            with self._changed:
                del self._started_s[number]
                self._note_oldest()
                self._changed.notify_all()

    def failed(self, error: OSError) -> None:
        """An operation failed as only a device does: it is away."""
        self._leave(str(error))

    def stalled(self) -> None:
        """An operation hangs: it is away."""
        self._leave(f"it has not answered for {self.deadline_s:g} s")
        self._on_stall()

    def close(self) -> None:
        """End the probing; a probe that hangs is left alone. Idempotent. Does not block."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _note_oldest(self) -> None:
        """Lock held."""
        self._stalls_at_s = next(iter(self._started_s.values()), math.inf) + self.deadline_s

    def _leave(self, why: str) -> None:
        with self._changed:
            if self._is_away or self._is_closed:
                return
            self._is_away = True
            if time.monotonic() - self._well_since_s > _WELL_S:
                self._pause_s = self._first_pause_s
        _log.warning("%s is away (%s): going on without it", self._name, why)
        threading.Thread(target=self._watch, name="hcache-probe", daemon=True).start()

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, self._pause_s)
                self._changed.wait_for(lambda: self._is_closed or not self.is_stuck)
                if self._is_closed:
                    return
            self._pause_s = min(LAST_PAUSE_S, 2 * self._pause_s)
            try:
                self._probe()
            except OSError:
                continue
            except Exception:
                if not self._is_closed:  # else what it probed was taken from under it
                    _log.exception("a probe of %s failed", self._name)
                continue
            with self._changed:
                if self.is_stuck:
                    continue
                self._is_away = False
                self._well_since_s = time.monotonic()
            _log.warning("%s is back", self._name)
            self._on_return()
            return
