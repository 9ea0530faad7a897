"""A fake engine, a fake store and poisoned buffers: whoever reads or writes a moment too late gets nonsense."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.identity import SpanId, chain_seed, pack_tokens, spans_of
from mii_hcache.core.layout import SpanLayout
from mii_hcache.core.plans import StoragePlan, uniform_storage
from mii_hcache.runtime.buffers import RowLease, RowRing, SpanBuffers, as_bytes
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.scatter import NativeScatter, Scatter, TorchScatter
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Stream
from mii_hcache.storage.base import ChunkStore, StoreStats
from mii_hcache.storage.native import why_not_built
from mii_hcache.storage.records import ChunkRead, ReadOutcome, SpanRecord

SEED = chain_seed(b"test")
GIVE_UP_S = 30.0
"""No test waits longer for anything: a deadlock fails instead of hanging."""


def geometry_of(*, num_layers: int = 3, hidden_size: int = 4, dtype: str = "float32") -> ModelGeometry:
    """Rows of both kinds are equally long by default: taking one kind for the other is not caught by a size."""
    return ModelGeometry(
        num_layers=num_layers, hidden_size=hidden_size, num_heads=2, num_kv_heads=1, head_size=2, dtype=dtype
    )


def path(branch: int, start: int, num_tokens: int) -> list[int]:
    """Tokens of a branch at positions from `start`: equal on equal branches, so that sequences share spans."""
    return [1000 * branch + (position * 37) % 101 for position in range(start, start + num_tokens)]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.0005)


# --- what a model computes -------------------------------------------------------------------------------------------


def history_hashes(token_ids: Sequence[int], before: int = 0) -> list[int]:
    """One number per token that depends on it, its position and all tokens before it (`before`: the last of those)."""
    hashes = []
    for token in token_ids:
        before = (before * 6364136223846793005 + token * 0x9E3779B97F4A7C15 + 1442695040888963407) & (2**64 - 1)
        hashes.append(before)
    return hashes


def rows_of(hashes: Sequence[int], kind: ChunkKind, layer_idx: int, geometry: ModelGeometry) -> torch.Tensor:
    """State `[num_tokens, row_elements]` of tokens with these histories; integers that a float32 holds exactly."""
    signed = torch.tensor([value - (value >> 63 << 64) for value in hashes], dtype=torch.int64)
    width = geometry.row_elements(kind)
    salt = 0x5851F42D * (2 * layer_idx + 1) + (0x1234567 if kind is ChunkKind.KV else 0)
    factors = torch.arange(1, width + 1, dtype=torch.int64) * 2654435761 * salt | 1
    return ((signed[:, None] * factors) >> 40 & 0xFFFFF).to(getattr(torch, geometry.dtype))


def span_chunks(token_ids: Sequence[int], kind: ChunkKind, geometry: ModelGeometry) -> list[bytes]:
    """Bytes of every chunk of the span that ends `token_ids`."""
    hashes = history_hashes(token_ids)[-SPAN_TOKENS:]
    return [bytes(as_bytes(rows_of(hashes, kind, layer, geometry))) for layer in geometry.saved_layers(kind)]


def span_record(token_ids: Sequence[int], kind: ChunkKind, geometry: ModelGeometry) -> SpanRecord:
    """What the record of the span that ends `token_ids` must say."""
    ids = [span_id for span_id, _ in spans_of(SEED, token_ids)]
    return SpanRecord(
        span_id=ids[-1],
        parent_id=ids[-2] if len(ids) > 1 else None,
        span_idx=len(ids) - 1,
        token_ids=pack_tokens(token_ids[-SPAN_TOKENS:]),
        layout=SpanLayout.uniform(geometry, kind),
    )


def kind_of(record: SpanRecord) -> ChunkKind:
    """The kind of a span that has only one."""
    (kind,) = record.layout.kind_counts
    return kind


class FakeBlocks:
    """KVTarget that reads the engine's tokens, while the sequence lives, and remembers what is written."""

    def __init__(self, engine: FakeEngine, uid: int | None = None) -> None:
        self._engine = engine
        self._uid = uid
        self.written: dict[tuple[int, int], tuple[str, list[float]]] = {}
        """(layer, position) to where the row came from and what it held."""
        self.num_writes: Counter[tuple[int, int]] = Counter()
        self.writes: list[tuple[int, int, int]] = []
        """(layer, start, num_tokens) of each call, in order."""
        self.committed: list[int] = []
        self.filled_ids: list[int] = []
        """Tokens that were filled through several layers."""

    def _write(self, source: str, layer_idx: int, start: int, rows: torch.Tensor) -> None:
        assert not self.committed, "written after the commit"
        self.writes.append((layer_idx, start, rows.shape[0]))
        for position, row in enumerate(rows.tolist(), start=start):
            self.written[layer_idx, position] = source, row
            self.num_writes[layer_idx, position] += 1

    def prepare(self) -> None:
        pass

    def fill(self, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        assert token_ids.dtype is torch.int64 and token_ids.dim() == 1
        if num_layers == 1:
            self._write("tokens", 0, start, token_ids[:, None])
            return
        assert token_ids.numel() <= self._engine.max_fill_tokens
        for layer_idx in range(num_layers - 1):
            missing = [position for position in range(start) if (layer_idx, position) not in self.written]
            assert not missing, f"layer {layer_idx} attends to tokens {missing} that are not there"
        del self.filled_ids[start:]
        assert len(self.filled_ids) == start, "tokens were left out"
        self.filled_ids += token_ids.tolist()
        for layer_idx in range(num_layers):
            self._write("filled", layer_idx, start, token_ids[:, None])

    def project_hidden(self, layer_idx: int, start: int, hidden: torch.Tensor) -> None:
        assert hidden.shape[1:] == (self._engine.geometry.hidden_size,) and hidden.dtype is self._engine.dtype
        self._write("hidden", layer_idx, start, hidden)

    def write_kv(self, layer_idx: int, start: int, kv: torch.Tensor, stream: Stream) -> None:
        stream.launch(partial(self._write_kv, layer_idx, start, kv))

    def _write_kv(self, layer_idx: int, start: int, kv: torch.Tensor) -> None:
        geometry = self._engine.geometry
        assert kv.shape[1:] == (2, geometry.num_kv_heads, geometry.head_size) and kv.dtype is self._engine.dtype
        self._write("kv", layer_idx, start, kv.reshape(kv.shape[0], -1))

    def read_kv(self, layer_idx: int, start: int, out: torch.Tensor) -> None:
        assert self._uid is not None
        hashes = self._engine.hashes[self._uid]
        assert start + out.shape[0] <= len(hashes), "read from blocks that hold nothing yet"
        rows = rows_of(hashes[start : start + out.shape[0]], ChunkKind.KV, layer_idx, self._engine.geometry)
        out.copy_(rows.view(out.shape))

    def gather_kv(self, layers: Sequence[int], start: int, out: torch.Tensor) -> None:
        for layer_idx, rows in zip(layers, out, strict=True):
            self.read_kv(layer_idx, start, rows)

    def commit(self, num_tokens: int) -> None:
        self.committed.append(num_tokens)


class FakeEngine:
    """EngineAdapter whose norm writes where the saver wants it, or, by turns, into one buffer for every layer of every
    step, as a norm does that cannot choose. What a step's rows held before is poisoned."""

    device = torch.device("cpu")
    max_fill_tokens = 128

    def __init__(self, geometry: ModelGeometry, *, max_batch_tokens: int = 256) -> None:
        self.geometry = geometry
        self.dtype: torch.dtype = getattr(torch, geometry.dtype)
        self.max_batch_tokens = max_batch_tokens
        self.tokens: dict[int, list[int]] = {}
        self.hashes: dict[int, list[int]] = {}
        self._norm_out = torch.full((max_batch_tokens, geometry.hidden_size), float("nan"), dtype=self.dtype)
        self._uids = itertools.count(1)
        self._norms = itertools.count()

    def norm_output(self, saver: Saver, layer_idx: int, num_tokens: int) -> torch.Tensor:
        """Where the next norm writes."""
        rows = saver.rows_for(layer_idx, num_tokens)
        return self._norm_out[:num_tokens] if rows is None or next(self._norms) % 5 == 0 else rows

    def open(self, token_ids: Sequence[int] = ()) -> int:
        """A sequence with these tokens in its blocks."""
        uid = next(self._uids)
        self.tokens[uid] = list(token_ids)
        self.hashes[uid] = history_hashes(token_ids)
        return uid

    def truncate(self, uid: int, num_tokens: int) -> None:
        del self.tokens[uid][num_tokens:], self.hashes[uid][num_tokens:]

    def evict(self, uid: int) -> None:
        del self.tokens[uid], self.hashes[uid]

    def target(self, uid: int) -> FakeBlocks:
        return FakeBlocks(self, uid)

    def step(self, saver: Saver, batch: dict[int, list[int]], *, fail_at_layer: int | None = None) -> None:
        """One forward over a ragged batch, with the saver's calls around it as the scheduler makes them."""
        saver.begin_step([StepSegment(uid=uid, token_ids=tokens) for uid, tokens in batch.items()])
        try:
            self._forward(saver, batch, fail_at_layer)
        except BaseException:
            saver.abort_step()
            raise
        saver.end_step()

    def _forward(self, saver: Saver, batch: dict[int, list[int]], fail_at_layer: int | None) -> None:
        hashes: list[int] = []
        for uid, tokens in batch.items():
            known = self.hashes[uid]
            new = history_hashes(tokens, known[-1] if known else 0)
            hashes += new
            known += new
            self.tokens[uid] += tokens
        wanted = [saver.rows_for(layer_idx, len(hashes)) for layer_idx in range(self.geometry.num_layers)]
        for rows in wanted:
            if rows is not None:
                rows.fill_(float("nan"))
        for layer_idx in range(self.geometry.num_layers):
            if layer_idx == fail_at_layer:
                raise RuntimeError("the engine failed")
            hidden = self.norm_output(saver, layer_idx, len(hashes))
            hidden.copy_(rows_of(hashes, ChunkKind.HIDDEN, layer_idx, self.geometry))
            saver.tap(layer_idx, hidden)
            self._norm_out.fill_(float("nan"))


# --- stores ----------------------------------------------------------------------------------------------------------


def address_of(buffer: memoryview) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()


class FakeStore(ChunkStore):
    """Spans in a dict, and every way in which a store can misbehave."""

    name = "fake"

    def __init__(self) -> None:
        self.spans: dict[SpanId, tuple[SpanRecord, list[bytes]]] = {}
        self.puts: list[SpanId] = []
        """Every put that came in, in order of coming in."""
        self.put_gate = threading.Event()
        """Puts wait for it: a disk that hangs while it is not set."""
        self.put_gate.set()
        self.read_gate = threading.Event()
        self.read_gate.set()
        self.mode = "ok"
        """What becomes of puts: `ok`, `slow`, `full` or `broken`."""
        self.read_delays: Iterable[float] | None = None
        """Seconds that each read takes."""
        self.damage: dict[tuple[SpanId, int], str | Exception] = {}
        """(span, layer) to the reason, or the exception, that a read of it gives."""
        self.why: dict[SpanId, str] = {}
        self.tiers: dict[SpanId, str] = {}
        self.pins: Counter[SpanId] = Counter()
        self.num_pins = self.num_unpins = 0
        self.touched: list[SpanId] = []
        self.reads: list[tuple[SpanId, int]] = []
        self.fail_find: Exception | None = None
        self.lent: list[memoryview] = []
        self.read_into: set[int] = set()
        """Where the memory of reads starts."""
        self._lock = threading.Lock()

    def add(self, token_ids: Sequence[int], kinds: Sequence[ChunkKind], geometry: ModelGeometry) -> list[SpanRecord]:
        """Store the spans of `token_ids`, each in its kind."""
        records = []
        for span_idx, kind in enumerate(kinds):
            history = token_ids[: (span_idx + 1) * SPAN_TOKENS]
            record = span_record(history, kind, geometry)
            self.spans[record.span_id] = record, span_chunks(history, kind, geometry)
            records.append(record)
        return records

    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        with self._lock:
            self.puts.append(record.span_id)
        assert self.put_gate.wait(GIVE_UP_S), "nobody opened the gate"
        if self.mode == "broken":
            raise OSError("the device is gone")
        if self.mode == "full":
            return False
        if self.mode == "slow":
            time.sleep(0.001)
        record.check_chunks(chunks)
        copies = [bytes(chunk) for chunk in chunks]
        with self._lock:
            self.spans.setdefault(record.span_id, (record, copies))
        return True

    def lend(self, buffer: memoryview) -> None:
        self.lent.append(buffer)

    def take_back(self, buffer: memoryview) -> None:
        self.lent = [one for one in self.lent if one is not buffer]

    def find(self, span_id: SpanId) -> SpanRecord | None:
        if self.fail_find is not None:
            raise self.fail_find
        found = self.spans.get(span_id)
        return None if found is None else found[0]

    def tier_of(self, span_id: SpanId) -> str | None:
        return self.tiers.get(span_id, self.name)

    def why_missing(self, span_id: SpanId) -> str:
        return self.why.get(span_id, "not_saved")

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        with self._lock:
            delay_s = next(self.read_delays, 0.0) if self.read_delays is not None else 0.0  # type: ignore[call-overload]
            self.reads += [(read.span_id, read.layer_idx) for read in reads]
        time.sleep(delay_s)
        assert self.read_gate.wait(GIVE_UP_S), "nobody opened the gate"
        for idx, read in enumerate(reads):
            self.read_into.add(address_of(read.out))
            read.out[:] = b"\xff" * read.out.nbytes
            trouble: Any = self.damage.get((read.span_id, read.layer_idx))
            if isinstance(trouble, Exception):
                raise trouble
            found = self.spans.get(read.span_id)
            chunk_idx = None if found is None else read.chunk_of(found[0])
            if chunk_idx is None:
                trouble = "missing"
            if trouble is not None:
                for rest in reads[idx:]:
                    rest.out[:] = b"\xff" * rest.out.nbytes
                return ReadOutcome(num_ok=idx, reason=trouble)
            assert found is not None and chunk_idx is not None
            read.out[:] = found[1][chunk_idx]
        return ReadOutcome(num_ok=len(reads))

    def touch(self, span_ids: Iterable[SpanId]) -> None:
        self.touched += span_ids

    def pin(self, span_ids: Iterable[SpanId]) -> None:
        self.num_pins += 1
        self.pins.update(span_ids)

    def unpin(self, span_ids: Iterable[SpanId]) -> None:
        self.num_unpins += 1
        self.pins.subtract(span_ids)
        assert all(count >= 0 for count in self.pins.values()), "unpinned twice"

    def delete(self, span_ids: Iterable[SpanId]) -> int:
        return sum(self.spans.pop(span_id, None) is not None for span_id in span_ids)

    def flush(self) -> None:
        pass

    def stats(self) -> StoreStats:
        raise NotImplementedError

    def close(self) -> None:
        pass


# --- copies -----------------------------------------------------------------------------------------------------------

SCATTERS = ("torch", "native")


def scatter_named(name: str) -> Scatter:
    """A scatter; the native one hands tiny rows to several threads, too."""
    if name == "torch":
        return TorchScatter()
    why_not = why_not_built()
    if why_not is not None:
        pytest.skip(why_not)
    return NativeScatter(4, bytes_per_thread=16)


# --- buffers that tell ------------------------------------------------------------------------------------------------


class PoisonedRing(RowRing):
    """Rows are NaN when handed out and when given back, and are given back once."""

    def acquire(self, num_rows: int, wait_s: float = 0.0) -> RowLease | None:
        lease = super().acquire(num_rows, wait_s)
        if lease is not None:
            lease.rows.fill_(float("nan"))
        return lease

    def release(self, lease: RowLease) -> None:
        assert not lease._done, "released twice"
        lease.rows.fill_(float("nan"))
        super().release(lease)


class PoisonedBuffers(SpanBuffers):
    """Buffers hold 0xff (NaN in every float type) when handed out and when given back, and are given back once."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._out: set[int] = set()

    def acquire(self, wait_s: float = 0.0) -> torch.Tensor | None:
        buffer = super().acquire(wait_s)
        if buffer is not None:
            buffer.view(torch.uint8).fill_(0xFF)
            self._out.add(id(buffer))
        return buffer

    def release(self, buffer: torch.Tensor) -> None:
        assert id(buffer) in self._out, "released twice"
        self._out.remove(id(buffer))
        buffer.view(torch.uint8).fill_(0xFF)
        super().release(buffer)


def open_saver(engine: FakeEngine, store: ChunkStore, saved: ChunkKind | StoragePlan | None, **settings: Any) -> Saver:
    """A saver over poisoned memory, of all layers in one kind or as a plan says."""
    plan = uniform_storage(engine.geometry, saved) if isinstance(saved, ChunkKind) else saved
    with (
        mock.patch("mii_hcache.runtime.saver.RowRing", PoisonedRing),
        mock.patch("mii_hcache.runtime.cutter.SpanBuffers", PoisonedBuffers),
        mock.patch("mii_hcache.runtime.block_reader.SpanBuffers", PoisonedBuffers),
    ):
        return Saver(
            adapter=engine,
            store=store,
            plan=plan,
            max_batch_tokens=engine.max_batch_tokens,
            counters=settings.pop("counters", Counters()),
            **settings,
        )


def open_restorer(engine: FakeEngine, store: ChunkStore, **settings: Any) -> Restorer:
    """A restorer over poisoned memory."""
    with mock.patch("mii_hcache.runtime.restorer.SpanBuffers", PoisonedBuffers):
        return Restorer(adapter=engine, store=store, counters=settings.pop("counters", Counters()), **settings)
