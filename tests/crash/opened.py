"""Opening the store under test, however many paths it has."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.open import open_state
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.tiered import TieredStore
from mii_hcache.storage.transcripts import Transcripts


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """A store to open. Survives JSON."""

    paths: tuple[str, ...]
    io: str
    capacity_bytes: int
    dram_bytes: int = 0
    """Of the tier in front; 0 for none."""
    segment_bytes: int = 200_000
    flush_interval_s: float | None = 0.005
    durability: str = "strict"

    def moved_to(self, root: Path) -> StoreSpec:
        """The same store, its paths moved into another directory."""
        return StoreSpec(**{**asdict(self), "paths": tuple(str(root / Path(path).name) for path in self.paths)})


@dataclass(kw_only=True)
class OpenedStore:
    """A store, its transcripts, and what opening had to say."""

    store: ChunkStore
    transcripts: Transcripts
    notes: list[str]
    undo: ExitStack
    file: Any = None
    """The file tier, where it is one that we opened ourselves."""

    def close(self) -> None:
        """Flush and release all."""
        self.undo.close()


def file_stores(store: Any) -> list[Any]:
    """The file stores in a store, one for each directory that is there."""
    if isinstance(store, FileStore):
        return [store]
    inner = getattr(store, "_file", None)
    return list(getattr(store, "stores", [])) if inner is None else file_stores(inner)


def open_store(spec: StoreSpec) -> OpenedStore:
    """One path: the file store itself, with small segments and a quick pulse. Several: what `open_state` makes of
    them. Raises what opening raises."""
    if len(spec.paths) > 1:
        state = open_state(
            list(spec.paths), spec.capacity_bytes, spec.dram_bytes, io=spec.io, durability=spec.durability
        )
        undo = ExitStack()
        undo.callback(state.close)
        return OpenedStore(store=state.store, transcripts=state.transcripts, notes=list(state.notes), undo=undo)
    with ExitStack() as stack:
        state_dir = StateDir(spec.paths[0])
        stack.callback(state_dir.close)
        file = FileStore(
            state_dir,
            spec.capacity_bytes,
            segment_bytes=spec.segment_bytes,
            flush_interval_s=spec.flush_interval_s,
            io=spec.io,
            durability=spec.durability,
            first_pause_s=0.02,
        )
        stack.callback(file.close)
        transcripts = Transcripts(state_dir.transcripts)
        stack.callback(transcripts.close)
        store: ChunkStore = file
        if spec.dram_bytes:
            store = TieredStore(MemoryStore(spec.dram_bytes), file, put_wait_s=5.0)
            stack.callback(store.close)
        notes = [*file.notes, *([transcripts.note] if transcripts.note else [])]
        return OpenedStore(store=store, transcripts=transcripts, notes=notes, undo=stack.pop_all(), file=file)
