"""One directory of a striped store: open, or looked for."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from mii_hcache.errors import HCacheError
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.state_dir import StateDir

_log = logging.getLogger(__name__)

FIRST_LOOK_S = 1.0
LAST_LOOK_S = 30.0
"""Pauses between looks for a directory that is missing: the first, and the longest."""
CLOSE_S = 2.0
"""How long closing waits for a look that is opening the directory: recovering a catalog takes moments, but a disk may
hang for ever."""
OpenPath = Callable[[], "tuple[StateDir, FileStore]"]
"""Opens the directory. Raises OSError, HCacheError."""


class StripePath:
    """A FileStore and its directory, from when it can be had on; owns both. Safe from any thread.

    A directory that cannot be opened, or does not answer, is looked for in the background until it can be.
    """

    def __init__(
        self,
        path: Path,
        open_path: OpenPath,
        *,
        on_open: Callable[[FileStore], None] = lambda store: None,
        first_look_s: float = FIRST_LOOK_S,
    ) -> None:
        """Begins to look. `on_open` is told of a store, on the thread that looks, before anybody else gets it and once
        more after that."""
        self.path = path
        self.store: FileStore | None = None
        """None while the directory is missing."""
        self.first_error: Exception | None = None
        """Why the first look was in vain."""
        self.why_missing: str | None = "it does not answer"
        """For people; None while the store is open."""
        self._open_path = open_path
        self._on_open = on_open
        self._first_look_s = first_look_s
        self._state_dir: StateDir | None = None
        self._lock = threading.Lock()
        """Guards `store` with `_closing`."""
        self._closing = threading.Event()
        self._looked = threading.Event()
        self._looking = threading.Thread(target=self._look, name="hcache-look", daemon=True)
        self._looking.start()

    def wait_for_look(self, timeout_s: float) -> None:
        """Wait until the first look has ended, well or not."""
        self._looked.wait(timeout_s)

    def close(self) -> None:
        """Close the store, if it is there or about to be; a directory whose disk hangs stays locked. Blocks, bounded.
        Idempotent."""
        self._closing.set()
        self._looking.join(CLOSE_S)
        with self._lock:
            store, state_dir = self.store, self._state_dir
        if store is not None and state_dir is not None:
            store.close()
            if store.has_ended:
                state_dir.close()

    def _look(self) -> None:
        pause_s = self._first_look_s
        while not self._closing.is_set():
            try:
                state_dir, store = self._open_path()
            except (OSError, HCacheError, sqlite3.Error) as error:
                self.why_missing = str(error)
                if not self._looked.is_set():
                    self.first_error = error
                    _log.warning("%s is missing (%s); looking for it", self.path, error)
                self._looked.set()
                self._closing.wait(pause_s)
                pause_s = min(LAST_LOOK_S, 2 * pause_s)
                continue
            self._adopt(state_dir, store)
            return

    def _adopt(self, state_dir: StateDir, store: FileStore) -> None:
        self._on_open(store)
        with self._lock:
            is_wanted = not self._closing.is_set()
            if is_wanted:
                self.store, self._state_dir, self.why_missing = store, state_dir, None
        self._on_open(store)  # what happened between that and this
        if not is_wanted:
            store.close()
            if store.has_ended:
                state_dir.close()
        elif self._looked.is_set():
            _log.warning("%s is back; what lies there can be restored again", self.path)
        self._looked.set()
