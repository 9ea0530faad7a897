"""Opening everything that is saved, in one call."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field

from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.expiry import Expiry
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.pins import Pins
from mii_hcache.storage.room import Watermarks
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.tiered import TieredStore
from mii_hcache.storage.transcripts import Transcripts


@dataclass(frozen=True, kw_only=True)
class OpenedState:
    """Saved state, open. Its parts are for any thread; `close` is for the one that ends it."""

    store: ChunkStore
    transcripts: Transcripts
    pins: Pins
    state_dir: StateDir | None
    """None when nothing outlives the process."""
    expiry: Expiry | None = None
    """None: nothing expires."""
    notes: list[str] = field(default_factory=list)
    """Sentences for people about what was found damaged; empty when all is well."""

    def close(self) -> None:
        """Flush and release all. Blocks on I/O. Idempotent."""
        with ExitStack() as stack:  # later ones are closed even if an earlier one raises
            if self.state_dir is not None:
                stack.callback(self.state_dir.close)
            stack.callback(self.transcripts.close)
            stack.callback(self.pins.close)
            stack.callback(self.store.close)
            if self.expiry is not None:
                stack.callback(self.expiry.close)


def open_state(
    directory: str | os.PathLike[str] | None,
    capacity_bytes: int,
    dram_capacity_bytes: int,
    *,
    io: str = "auto",
    durability: str = "relaxed",
    evict: str = "lru",
    expire_after_s: float | None = None,
) -> OpenedState:
    """Open the state in `directory`: at most `capacity_bytes` of files, with `dram_capacity_bytes` of DRAM in front (0
    for none). Without a directory all lives in DRAM and ends with the process. `io`: see `storage.open_io`;
    `durability`: see `storage.format`; `evict`: see `storage.eviction`. What nobody
    used for `expire_after_s` is deleted; None keeps it.

    Blocks on I/O. Raises StateDirBusyError, ConfigError. Damage does not raise: it is set aside, and `notes` say so.
    """
    if directory is None:
        memory = MemoryStore(dram_capacity_bytes, evict=evict)
        transcripts = Transcripts(None)
        pins = Pins(None, memory, memory.flush)
        expiry = None if expire_after_s is None else Expiry(memory, transcripts, expire_after_s)
        return OpenedState(store=memory, transcripts=transcripts, pins=pins, state_dir=None, expiry=expiry)
    with ExitStack() as undo:
        state_dir = StateDir(directory)
        undo.callback(state_dir.close)
        file = FileStore(state_dir, capacity_bytes, io=io, durability=durability, evict=evict, watermarks=Watermarks())
        undo.callback(file.close)
        transcripts = Transcripts(state_dir.transcripts)
        undo.callback(transcripts.close)
        store = TieredStore(MemoryStore(dram_capacity_bytes, evict=evict), file) if dram_capacity_bytes else file
        pins = Pins(state_dir.pins, file, store.flush)
        undo.callback(pins.close)
        expiry = None if expire_after_s is None else Expiry(store, transcripts, expire_after_s)
        undo.pop_all()
    notes = [*file.notes, *(note for note in (transcripts.note, pins.note) if note)]
    return OpenedState(store=store, transcripts=transcripts, pins=pins, state_dir=state_dir, expiry=expiry, notes=notes)
