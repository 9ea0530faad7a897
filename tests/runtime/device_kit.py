"""A restorer on a fake device: blocks that hold poison, buffers that are poisoned, reads that are noted."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import mii_hcache.runtime
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.runtime.buffers import SpanBuffers
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Stream
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.records import ChunkRead, ReadOutcome
from tests.fake_device import FakeStreams
from tests.runtime.kit import FakeEngine, address_of, history_hashes, rows_of

BLOCK_TOKENS = 16


class TracedBuffers(SpanBuffers):
    """Host buffers that are watched: who gives one back has done with it, who takes one comes after. Poisoned at both
    moments, and given back once."""

    streams: FakeStreams

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._given: dict[int, Any] = {}
        self._out: set[int] = set()

    def acquire(self, wait_s: float = 0.0) -> torch.Tensor | None:
        buffer = super().acquire(wait_s)
        checker = self.streams.checker
        if buffer is not None:
            if id(buffer) in self._given:
                checker.acquire(self._given.pop(id(buffer)))
            else:
                checker.watch(buffer, f"host buffer {self._made}")
            self._poison(buffer, "taken")
            self._out.add(id(buffer))
        return buffer

    def release(self, buffer: torch.Tensor) -> None:
        assert id(buffer) in self._out, "given back twice"
        self._out.remove(id(buffer))
        self._poison(buffer, "given back")
        self._given[id(buffer)] = self.streams.checker.release()
        super().release(buffer)

    def _poison(self, buffer: torch.Tensor, label: str) -> None:
        self.streams.checker.note(buffer, writes=True, label=label)
        buffer.numpy()[:] = 0xFF


class TracedRestorer(Restorer):
    """Reader threads start after what the engine thread did, and it goes on after what they read."""

    def submit_read(self, read: Callable[[], ReadOutcome]) -> Future[ReadOutcome]:
        checker = self.streams.checker  # type: ignore[attr-defined]
        started = checker.release()
        ended: list[Any] = []

        def run() -> ReadOutcome:
            checker.acquire(started)
            try:
                return read()
            finally:
                ended.append(checker.release())

        future = super().submit_read(run)
        result, done = future.result, future.done

        def hear() -> None:
            if ended:
                checker.acquire(ended[0])

        def heard_result(timeout: float | None = None) -> ReadOutcome:
            outcome = result(timeout)
            hear()
            return outcome

        def heard_done() -> bool:
            is_done = done()
            if is_done:
                hear()
            return is_done

        call_back = future.add_done_callback

        def heard_call_back(then: Callable[[Future[ReadOutcome]], object]) -> None:
            call_back(lambda ended: (hear(), then(ended)))

        future.result, future.done = heard_result, heard_done  # type: ignore[method-assign]
        future.add_done_callback = heard_call_back  # type: ignore[method-assign]
        return future


def note_reads(streams: FakeStreams, store: ChunkStore) -> None:
    """Note where a store's reads write."""
    get_into = store.get_into

    def noted(reads: Sequence[ChunkRead]) -> ReadOutcome:
        for read in reads:
            streams.checker.note_bytes(address_of(read.out), read.out.nbytes, writes=True, label="read from the store")
        return get_into(reads)

    store.get_into = noted  # type: ignore[method-assign]


def device_restorer(streams: FakeStreams, adapter: Any, store: ChunkStore, **settings: Any) -> Restorer:
    """A restorer on a fake device; its ring and its host buffers are watched. Call it within `streams.watching()`."""
    note_reads(streams, store)
    buffers = type("Buffers", (TracedBuffers,), {"streams": streams})
    streams.allocating = "the ring"
    try:
        with mock.patch("mii_hcache.runtime.restorer.SpanBuffers", buffers):
            return TracedRestorer(
                adapter=adapter, store=store, counters=settings.pop("counters", Counters()), streams=streams, **settings
            )
    finally:
        streams.allocating = None


class Pool:
    """Blocks of all layers, handed out in random order; free ones hold NaN."""

    def __init__(self, streams: FakeStreams, geometry: ModelGeometry, num_blocks: int, chooser: random.Random) -> None:
        self.geometry = geometry
        self.rows = torch.full(
            (geometry.num_layers, num_blocks * BLOCK_TOKENS, 2, geometry.num_kv_heads, geometry.head_size),
            float("nan"),
        )
        self._chooser = chooser
        self._free = list(range(num_blocks))
        streams.checker.watch(self.rows, "the blocks", streams.main.actor)

    def take(self, num_tokens: int) -> torch.Tensor:
        """Rows of new blocks; sometimes neighbours."""
        if self._chooser.random() < 0.5:
            self._chooser.shuffle(self._free)
        else:
            self._free.sort()
        blocks = [self._free.pop(0) for _ in range(num_tokens // BLOCK_TOKENS)]
        return torch.cat([torch.arange(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS) for block in blocks])

    def give_back(self, slots: torch.Tensor) -> None:
        """Poison them, as the engine's tests do, on the main stream."""
        self.rows[:, slots] = float("nan")
        self._free += sorted({int(slot) // BLOCK_TOKENS for slot in slots})


class PoolBlocks:
    """A `KVTarget` on a pool: K and V are twice the hidden state and one; what fills compute shows what they saw."""

    def __init__(self, pool: Pool, num_tokens: int) -> None:
        self.pool = pool
        self.slots = pool.take(num_tokens)
        self.committed: int | None = None
        self.is_given_back = self.is_prepared = False

    def prepare(self) -> None:
        self.is_prepared = True

    def fill(self, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        own = self.slots[start : start + token_ids.numel()]
        for layer_idx in range(num_layers):
            seen = self.pool.rows[layer_idx][self.slots[:start]] if layer_idx < num_layers - 1 else torch.zeros(1)
            assert not seen.isnan().any(), "a fill attends to what is not there"
            self.pool.rows[layer_idx][own] = token_ids.to(torch.float32)[:, None, None, None]

    def project_hidden(self, layer_idx: int, start: int, hidden: torch.Tensor) -> None:
        assert self.is_prepared
        kv = (2 * hidden + 1).view(hidden.shape[0], *self.pool.rows.shape[2:])
        self.pool.rows[layer_idx][self.slots[start : start + hidden.shape[0]]] = kv

    def write_kv(self, layer_idx: int, start: int, kv: torch.Tensor, stream: Stream) -> None:
        assert self.is_prepared
        pairs = []
        for at in range(0, kv.shape[0], BLOCK_TOKENS):
            row = int(self.slots[start + at])
            pairs.append((self.pool.rows[layer_idx, row : row + BLOCK_TOKENS], kv[at : at + BLOCK_TOKENS]))
        stream.copy_many(pairs)

    def read_kv(self, layer_idx: int, start: int, out: torch.Tensor) -> None:
        out.copy_(self.pool.rows[layer_idx][self.slots[start : start + out.shape[0]]])

    def commit(self, num_tokens: int) -> None:
        self.committed = num_tokens

    def check(self, token_ids: Sequence[int], sources: Callable[[int, int], str]) -> None:
        """What is committed is right, as the main stream sees it now. `sources(layer, position)`: where a cell came
        from: `tokens`, `hidden` or `kv`."""
        geometry, num_tokens = self.pool.geometry, self.committed
        hashes = history_hashes(token_ids[:num_tokens])
        ids = torch.tensor(token_ids[:num_tokens], dtype=torch.float32)
        for layer_idx in range(geometry.num_layers):
            rows = self.pool.rows[layer_idx][self.slots[:num_tokens]].flatten(1)
            values = {
                "tokens": ids[:, None].expand(-1, rows.shape[1]),
                "hidden": 2 * rows_of(hashes, ChunkKind.HIDDEN, layer_idx, geometry) + 1 if hashes else rows,
                "kv": rows_of(hashes, ChunkKind.KV, layer_idx, geometry) if hashes else rows,
            }
            for start in range(0, num_tokens or 0, SPAN_TOKENS):
                expected = values[sources(layer_idx, start)][start : start + SPAN_TOKENS]
                assert torch.equal(rows[start : start + SPAN_TOKENS], expected), f"layer {layer_idx}, token {start}"

    def give_back(self) -> None:
        """The sequence ends; as it is seen by the main stream, its blocks are anybody's."""
        assert not self.is_given_back
        self.is_given_back = True
        self.pool.give_back(self.slots)


class Device:
    """A restorer and a pool on a fake device."""

    def __init__(self, seed: int, *, ignored: tuple[str, int, str] | None = None, num_blocks: int = 160) -> None:
        self.chooser = random.Random(seed)
        self.streams = FakeStreams(seed, ignored=ignored, haste=self.chooser.choice([0.02, 0.1, 0.4]))
        self.engine = FakeEngine(_GEOMETRY)
        self.pool = Pool(self.streams, _GEOMETRY, num_blocks, self.chooser)


_GEOMETRY = ModelGeometry(num_layers=3, hidden_size=8, num_heads=4, num_kv_heads=2, head_size=2, dtype="float32")


# --- waits that may be left out --------------------------------------------------------------------------------


def text_of(file: str, line: int) -> str:
    """A line of the package."""
    return (Path(mii_hcache.runtime.__file__).parent.parent / file).read_text().splitlines()[line - 1]


def waits_in(module: str, names: set[str]) -> list[tuple[str, int]]:
    """Where a module waits: calls or looks of these names, as (file name, line)."""
    file = Path(mii_hcache.runtime.__file__).parent / module
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in names:
            found.append((f"runtime/{module}", node.lineno))
    return found
