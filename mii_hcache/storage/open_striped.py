"""Opening the directories of a set as one store."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

from mii_hcache.errors import ConfigError, StateDirBusyError
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.stripe_path import FIRST_LOOK_S, StripePath
from mii_hcache.storage.stripe_set import Seat, StripeSet
from mii_hcache.storage.striped import StripedStore

OPENING_S = 60.0
"""How long a start waits for all directories: recovering large catalogs takes seconds, a disk that hangs for ever."""


def open_striped(
    stripes: StripeSet,
    capacity_bytes: int,
    *,
    opening_s: float = OPENING_S,
    first_look_s: float = FIRST_LOOK_S,
    **settings: Any,
) -> StripedStore:
    """A store over the directories of `stripes`, in equal shares of `capacity_bytes`. Those that cannot be opened now
    are missing until they can be: only a new one that cannot be made, or one that another server has, raises
    ConfigError or StateDirBusyError. Blocks on I/O, for at most about `opening_s`. `first_look_s`: before a directory
    that is missing or away is looked at again, for the first time. `settings`: of each `FileStore`."""
    share_bytes = capacity_bytes // len(stripes.seats)
    present: list[Seat] = []
    recording = threading.Lock()
    made: list[StripedStore] = []

    def open_seat(seat: Seat) -> tuple[StateDir, FileStore]:
        stripes.look_again(seat)
        if seat.why_missing is not None:
            raise OSError(errno.ENODEV, seat.why_missing)
        with ExitStack() as undo:
            state_dir = StateDir(seat.path)
            undo.callback(state_dir.close)
            store = FileStore(state_dir, share_bytes, first_pause_s=first_look_s, **settings)
            undo.callback(store.close)
            with recording:
                stripes.record(seat, present)
                present.append(seat)
            undo.pop_all()
        return state_dir, store

    def opens(store: FileStore) -> None:
        for striped in made:
            striped.path_opens(store)

    is_new = [seat.mount is None for seat in stripes.seats]
    with ExitStack() as undo:
        paths = []
        for seat in stripes.seats:
            paths.append(StripePath(seat.path, partial(open_seat, seat), on_open=opens, first_look_s=first_look_s))
            undo.callback(paths[-1].close)
        stop_s = time.monotonic() + opening_s
        for path in paths:
            path.wait_for_look(max(0.0, stop_s - time.monotonic()))
        for path, is_new_one in zip(paths, is_new, strict=True):
            error = path.first_error
            if isinstance(error, StateDirBusyError) or (is_new_one and isinstance(error, (ConfigError, OSError))):
                if isinstance(error, OSError):
                    raise ConfigError(f"state_dir {path.path} cannot be used ({error})") from error
                raise error
        made.append(StripedStore(paths))
        for late in made[0].stores:  # that opened while the store was being made: it was told of nobody
            opens(late)
        undo.pop_all()
    return made[0]
