"""Who touched which bytes when, and whether anything put that in order: vector clocks over watched memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

MAX_ACTORS = 256
"""Threads that were given up are replaced by others, with names of their own: more of them on a slow machine."""


class RaceError(AssertionError):
    """Two accesses that nothing puts in order."""


@dataclass(eq=False)
class Actor:
    """A stream or a host thread."""

    name: str
    idx: int
    clock: np.ndarray = field(default_factory=lambda: np.zeros(MAX_ACTORS, dtype=np.int64))


class _Memory:
    """Who touched each granule of a watched range last, and when on their own clocks."""

    def __init__(self, name: str, start: int, num_bytes: int, granule_bytes: int) -> None:
        self.name = name
        self.start = start
        self.stop = start + num_bytes
        self.num = -(-num_bytes // granule_bytes)
        self.writer = np.zeros(self.num, dtype=np.int16)
        self.written = np.zeros(self.num, dtype=np.int64)
        self.write_label = np.zeros(self.num, dtype=np.int32)
        self.read: dict[int, np.ndarray] = {}
        """By actor."""
        self.read_label: dict[int, str] = {}


class Checker:
    """Vector clocks over watched memory. Any thread."""

    def __init__(self, granule_bytes: int) -> None:
        """`granule_bytes`: bytes that are told apart. No row may be shorter, or start within."""
        self._granule_bytes = granule_bytes
        self._lock = threading.RLock()
        self._memories: list[_Memory] = []
        self._actors: dict[str, Actor] = {}
        self._labels: list[str] = ["nobody"]
        self._label_idxs: dict[str, int] = {}
        self.races: list[str] = []
        """All that were found, also those raised on threads that swallow them."""
        self.num_accesses = 0
        self.is_silent = False
        """Races are kept in `races` and not raised: only what comes of them shows."""

    # --- clocks -------------------------------------------------------------------------------------------------

    def actor(self, name: str) -> Actor:
        """The one of that name."""
        with self._lock:
            if name not in self._actors:
                actor = Actor(name, len(self._actors))
                assert actor.idx < MAX_ACTORS, "too many threads and streams"
                actor.clock[actor.idx] = 1
                self._actors[name] = actor
            return self._actors[name]

    @property
    def host(self) -> Actor:
        """The calling thread."""
        return self.actor(f"host thread {threading.current_thread().name}")

    def release(self, actor: Actor | None = None) -> np.ndarray:
        """What `actor` (None: this thread) has done and knows of, to be handed to somebody."""
        with self._lock:
            actor = actor or self.host
            clock = actor.clock.copy()
            actor.clock[actor.idx] += 1
            return clock

    def acquire(self, clock: np.ndarray, actor: Actor | None = None) -> None:
        """`actor` (None: this thread) goes on after what was released."""
        with self._lock:
            actor = actor or self.host
            np.maximum(actor.clock, clock, out=actor.clock)

    # --- memory -------------------------------------------------------------------------------------------------

    def watch(self, tensor: torch.Tensor, name: str, owner: Actor | None = None) -> None:
        """Look at the whole storage of a tensor from now on. `owner`: where it was allocated, and where others may have
        used it until now."""
        storage = tensor.untyped_storage()
        with self._lock:
            start = storage.data_ptr()
            self._memories = [one for one in self._memories if one.stop <= start or one.start >= start + len(storage)]
            memory = _Memory(name, start, len(storage), self._granule_bytes)
            self._memories.append(memory)
            if owner is not None:
                memory.writer[:] = owner.idx
                memory.written[:] = owner.clock[owner.idx]
                memory.write_label[:] = self._label(f"{owner.name} (allocated)")

    def watches(self, address: int) -> _Memory | None:
        """The watched memory that holds it."""
        for memory in self._memories:
            if memory.start <= address < memory.stop:
                return memory
        return None

    def note_bytes(self, address: int, num_bytes: int, *, writes: bool, label: str, actor: Actor | None = None) -> None:
        """An access to plain bytes."""
        memory = self.watches(address)
        if memory is not None:
            first = (address - memory.start) // self._granule_bytes
            last = (address + num_bytes - 1 - memory.start) // self._granule_bytes
            self._note(memory, np.arange(first, last + 1), writes, label, actor)

    def note(
        self,
        tensor: torch.Tensor,
        *,
        writes: bool,
        label: str,
        actor: Actor | None = None,
        indices: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """An access to a tensor's elements, or only to those under `indices`."""
        if tensor.numel() and (memory := self.watches(tensor.data_ptr())) is not None:
            self._note(memory, _granules(tensor, memory.start, indices, self._granule_bytes), writes, label, actor)

    def _note(self, memory: _Memory, at: np.ndarray, writes: bool, label: str, actor: Actor | None) -> None:
        with self._lock:
            actor = actor or self.host
            self.num_accesses += 1
            clock = actor.clock
            what = f"{actor.name} ({label})"
            late = memory.written[at] > clock[memory.writer[at]]
            if late.any():
                other = self._labels[memory.write_label[at[int(late.argmax())]]]
                self._tell(f"{memory.name}: written by {other}, {'written' if writes else 'read'} by {what}")
            if writes:
                for reader, read in memory.read.items():
                    if (read[at] > clock[reader]).any():
                        self._tell(f"{memory.name}: read by {memory.read_label[reader]}, written by {what}")
                    read[at] = 0
                memory.writer[at] = actor.idx
                memory.written[at] = clock[actor.idx]
                memory.write_label[at] = self._label(what)
            else:
                if actor.idx not in memory.read:
                    memory.read[actor.idx] = np.zeros(memory.num, dtype=np.int64)
                memory.read[actor.idx][at] = clock[actor.idx]
                memory.read_label[actor.idx] = what

    def _label(self, text: str) -> int:
        if text not in self._label_idxs:
            self._label_idxs[text] = len(self._labels)
            self._labels.append(text)
        return self._label_idxs[text]

    def _tell(self, race: str) -> None:
        self.races.append(race)
        if not self.is_silent:
            raise RaceError(f"{race}: nothing puts these in order")


def _granules(
    tensor: torch.Tensor, start: int, indices: Sequence[torch.Tensor | None] | None, granule_bytes: int
) -> np.ndarray:
    """Numbers of the granules of a tensor's elements (or of those under `indices`, for its first dimensions)."""
    sizes, strides = list(tensor.shape), list(tensor.stride())
    keep = len(indices) if indices is not None else 0
    run = 1
    while len(sizes) > keep and (strides[-1] == run or sizes[-1] == 1):
        run *= sizes.pop()
        strides.pop()
    offsets: Any = np.zeros((), dtype=np.int64)
    for size, stride in zip(sizes, strides, strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    if indices is not None:
        offsets = torch.from_numpy(np.ascontiguousarray(offsets))[
            tuple(slice(None) if index is None else index for index in indices)
        ].numpy()
    itemsize = tensor.element_size()
    first = (tensor.data_ptr() - start + offsets.reshape(-1) * itemsize) // granule_bytes
    return (first[:, None] + np.arange(-(-run * itemsize // granule_bytes))).reshape(-1)
