"""Places in the store's code where a process may be made to die a moment later."""

from __future__ import annotations

import importlib
import random
import signal
from typing import Any

TRIPWIRES = (
    "database:Database.transact",
    "database:Database._make_file",
    "disk_io:ThreadsIO.write",
    "file:FileStore.close",
    "file:recover",
    "room:Room.erase",
    "room:Room.reserve",
    "room:Room.shrink",
    "segment:SegmentFile._make",
    "segment:SegmentFile.punch",
    "segment:SegmentFile.sync",
    "segment:SegmentFile.unlink",
    "state_dir:StateDir.write_store_uuid",
    "uring:UringIO.write",
)
"""`module:name` under `mii_hcache.storage`."""


def find(tripwire: str) -> tuple[Any, str]:
    """The object that has the function, and the function's name. Raises AttributeError, ImportError."""
    module_name, _, dotted = tripwire.partition(":")
    owner: Any = importlib.import_module(f"mii_hcache.storage.{module_name}")
    *path, name = dotted.split(".")
    for part in path:
        owner = getattr(owner, part)
    getattr(owner, name)
    return owner, name


def lay(tripwire: str, call: int, delay_s: float) -> None:
    """Die by a signal `delay_s` after the function was called for the `call`-th time. The kernel's timer kills: no lock
    of the interpreter's decides when."""
    owner, name = find(tripwire)
    original = getattr(owner, name)
    num_calls = 0
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def tripped(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            signal.setitimer(signal.ITIMER_REAL, max(delay_s, 1e-6))
        return original(*args, **kwargs)

    setattr(owner, name, tripped)


def choose(rng: random.Random, among: tuple[str, ...] = TRIPWIRES) -> dict[str, Any]:
    """Arguments for `lay`."""
    return {"tripwire": rng.choice(among), "call": rng.choice([1, 1, 1, 2, 3, 5, 8]), "delay_s": rng.uniform(0, 0.002)}
