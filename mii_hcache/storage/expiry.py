"""What nobody used for long is deleted, bytes and all."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.transcripts import Transcripts

_log = logging.getLogger(__name__)

_SHARE = 1 / 20
"""How much later than promised, as a share of the time to expire, ..."""
_MOST_WAIT_S = 60.0
"""... and at most."""


class Expiry:
    """Deletes spans and transcripts that were not used for `after_s`: once before it is made, then on a thread of its
    own. What is pinned stays. Writes last uses out every time, so that a crash forgets a minute of them at most.

    The clock is the wall's: it counts while the server is down, and who sets it forward expires what is there.
    """

    def __init__(
        self,
        store: ChunkStore,
        transcripts: Transcripts,
        after_s: float,
        *,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Blocks on I/O."""
        self._store, self._transcripts, self._after_s, self._clock = store, transcripts, after_s, clock or time.time
        self._closing = threading.Event()
        self.run()
        self._thread = threading.Thread(target=self._work, name="hcache-expiry", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Delete what is due. Blocks until it is gone for good."""
        since_s = self._clock() - self._after_s
        num_spans = len(self._store.expire(since_s))
        num_texts = self._transcripts.expire(since_s)
        self._store.flush()
        self._transcripts.flush()
        if num_spans or num_texts:
            _log.info("%d spans and %d texts were not used for %.0f s: deleted", num_spans, num_texts, self._after_s)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closing.wait(min(_MOST_WAIT_S, self._after_s * _SHARE)):
            try:
                self.run()
            except Exception:
                _log.exception("nothing could be expired; it will be tried again")
