"""Opening everything that is saved, in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.borrowing import SpanMemory
from mii_hcache.storage.expiry import Expiry
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.pins import Pins
from mii_hcache.storage.presence import DEADLINE_S
from mii_hcache.storage.room import Watermarks
from mii_hcache.storage.state_dir import PINS_FILE, TRANSCRIPTS_FILE, StateDir
from mii_hcache.storage.stripe_set import StripeSet
from mii_hcache.storage.striped import StripedStore
from mii_hcache.storage.tiered import TieredStore
from mii_hcache.storage.transcripts import Transcripts

Directories = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""One state directory, or several."""


@dataclass(frozen=True, kw_only=True)
class OpenedState:
    """Saved state, open. Its parts are for any thread; `close` is for the one that ends it."""

    store: ChunkStore
    transcripts: Transcripts
    pins: Pins
    directories: tuple[Path, ...] = ()
    """Those that are there, by ordinal: the first keeps what there is one of. Empty when nothing outlives the
    process."""
    state_dir: StateDir | None = None
    """Of a single directory; several are owned by the store."""
    expiry: Expiry | None = None
    """None: nothing expires."""
    notes: list[str] = field(default_factory=list)
    """Sentences for people about what is missing or was found damaged; empty when all is well."""
    _file: ChunkStore | None = None

    def close(self) -> None:
        """Flush and release all. Blocks on I/O, bounded: a directory whose disk hangs stays locked. Idempotent."""
        with ExitStack() as stack:  # later ones are closed even if an earlier one raises
            stack.callback(self._release)
            stack.callback(self.transcripts.close)
            stack.callback(self.pins.close)
            stack.callback(self.store.close)
            if self.expiry is not None:
                stack.callback(self.expiry.close)

    def _release(self) -> None:
        has_ended = self._file.has_ended if isinstance(self._file, FileStore) else True
        if self.state_dir is not None and has_ended:
            self.state_dir.close()


def _let_go(state_dir: StateDir, file: FileStore) -> None:
    """Unlock a directory, unless its disk hangs: what is written there late would hit another owner."""
    if file.has_ended:
        state_dir.close()


def open_state(
    directory: Directories | None,
    capacity_bytes: int,
    dram_capacity_bytes: int,
    *,
    io: str = "auto",
    deadline_s: float = DEADLINE_S,
    durability: str = "relaxed",
    evict: str = "lru",
    expire_after_s: float | None = None,
    memory: SpanMemory | None = None,
) -> OpenedState:
    """Open the state in `directory`: at most `capacity_bytes` of files, with `dram_capacity_bytes` of DRAM in front (0
    for none). Several directories, each on a disk of its own, are striped over, in equal shares; one that is missing
    is done without until it is back. Without a directory all lives in DRAM and ends with the process. `io`: see
    `storage.open_io`; `durability`: see `storage.format`; `evict`: see `storage.eviction`. A disk that takes longer
    than `deadline_s` is done without for as long as it hangs. What nobody used for `expire_after_s` is deleted; None
    keeps it. `memory`: where what is in DRAM lies, None for the system's.

    Blocks on I/O. Raises StateDirBusyError, ConfigError. Damage does not raise: it is set aside, and `notes` say so.
    """
    if directory is None:
        in_dram = MemoryStore(dram_capacity_bytes, evict=evict, memory=memory)
        transcripts = Transcripts(None)
        pins = Pins(None, in_dram, in_dram.flush)
        expiry = None if expire_after_s is None else Expiry(in_dram, transcripts, expire_after_s)
        return OpenedState(store=in_dram, transcripts=transcripts, pins=pins, expiry=expiry)
    names = [directory] if isinstance(directory, (str, os.PathLike)) else directory
    paths = [Path(name).absolute() for name in names]
    stripes = StripeSet.of(paths)
    state_dir = None
    file: FileStore | StripedStore

    settings: dict[str, Any] = {
        "io": io,
        "deadline_s": deadline_s,
        "durability": durability,
        "evict": evict,
        "watermarks": Watermarks(),
    }
    with ExitStack() as undo:
        if len(paths) > 1:
            file = open_striped(stripes, capacity_bytes, **settings)
            present = tuple(path.path for path in file.paths if path.store is not None)
            home = stripes.seats[0].path if file.paths[0].store is not None else None
        else:
            state_dir = StateDir(paths[0])
            try:
                file = FileStore(state_dir, capacity_bytes, **settings)
            except BaseException:
                state_dir.close()
                raise
            undo.callback(_let_go, state_dir, file)
            present, home = (paths[0],), paths[0]
        undo.callback(file.close)
        transcripts = Transcripts(None if home is None else home / TRANSCRIPTS_FILE)
        undo.callback(transcripts.close)
        store: ChunkStore = file
        if dram_capacity_bytes:
            in_dram = MemoryStore(dram_capacity_bytes, evict=evict, memory=memory)
            store = TieredStore(in_dram, file, deadline_s=deadline_s)
        pins = Pins(None if home is None else home / PINS_FILE, file, store.flush)
        undo.callback(pins.close)
        # without the directory that keeps the pins nobody knows what must stay
        expiry = None if expire_after_s is None or home is None else Expiry(store, transcripts, expire_after_s)
        undo.pop_all()
    notes = [*stripes.notes, *file.notes, *(note for note in (transcripts.note, pins.note) if note)]
    if home is None:
        notes.append(
            f"{stripes.seats[0].path} keeps the transcripts and pins, and is missing: what clients send again may not "
            "be recognised, and what is learned is forgotten at the end"
        )
    return OpenedState(
        store=store,
        transcripts=transcripts,
        pins=pins,
        directories=present,
        state_dir=state_dir,
        expiry=expiry,
        notes=notes,
        _file=file,
    )
