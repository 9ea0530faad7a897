"""What the GPU tests share: streams that fall asleep now and then, and bytes of saved histories."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.engine.ragged_engine import HCacheEngine, token_tensors
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.streams import Event, Stream, Streams
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.records import ChunkRead, SpanRecord

MOST_CYCLES = 3_000_000
"""Of one sleep: one to two milliseconds."""


class SleepyStream(Stream):
    """A stream that sleeps before some of what it does, so that others run ahead of it."""

    def __init__(self, inner: Any, chance: random.Random, share: float) -> None:
        self._inner = inner
        self._chance = chance
        self._share = share

    def sleep(self) -> None:
        """Now and then, for so long or so."""
        if self._chance.random() < self._share:
            with torch.cuda.stream(self._inner.stream):
                torch.cuda._sleep(self._chance.randrange(MOST_CYCLES))

    def launch(self, work: Callable[[], None]) -> None:
        self.sleep()
        self._inner.launch(work)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.sleep()
        self._inner.copy(target, source)

    def copy_many(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.sleep()
        self._inner.copy_many(pairs)

    def record(self, **how: bool) -> Event:
        return self._inner.record(**how)

    def wait(self, event: Event) -> None:
        self._inner.wait(event)


class SleepyStreams(Streams):
    """Of a real device. How often each stream sleeps is drawn once, so that one may be late all the time."""

    has_own_memory = True
    main: SleepyStream

    def __init__(self, inner: Streams, seed: int) -> None:
        self._inner = inner
        self._chance = random.Random(seed)
        self.main = self._wrapped(inner.main)

    def _wrapped(self, stream: Stream) -> SleepyStream:
        return SleepyStream(stream, self._chance, self._chance.choice((0.0, 0.1, 0.5, 1.0)))

    def new(self, *, is_urgent: bool = False) -> SleepyStream:
        return self._wrapped(self._inner.new(is_urgent=is_urgent))


def prefill(
    engine: HCacheEngine,
    uid: int,
    token_ids: Sequence[int],
    chunk: int,
    *,
    saver: Saver | None = None,
    between: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """A sequence's next tokens; nothing waits for the device. Logits of the last one, `[vocab]`."""
    engine.model().qkv_input_tap = saver
    logits = torch.empty(0)
    for start in range(0, len(token_ids), chunk):
        piece = list(token_ids[start : start + chunk])
        between()
        if saver is not None:
            saver.begin_step([StepSegment(uid=uid, token_ids=piece)])
        logits = engine.put([uid], token_tensors([piece]))
        if saver is not None:
            saver.end_step()
    engine.model().qkv_input_tap = None
    return logits[0]


def saved_bytes(store: ChunkStore, records: Sequence[SpanRecord]) -> list[bytes]:
    """Every chunk of these spans, in order."""
    found = []
    for record in records:
        for chunk in record.layout.chunks:
            out = bytearray(chunk.num_bytes)
            read = ChunkRead(span_id=record.span_id, layer_idx=chunk.layer_idx, out=memoryview(out), kind=chunk.kind)
            outcome = store.get_into([read])
            assert outcome.num_ok == 1, outcome
            found.append(bytes(out))
    return found


def kv_of(engine: HCacheEngine, uid: int, num_tokens: int) -> torch.Tensor:
    """`[num_layers, num_tokens, 2, num_kv_heads, head_size]` on the host."""
    geometry = engine.geometry
    layers = []
    for layer_idx in range(geometry.num_layers):
        out = torch.empty(num_tokens, 2, geometry.num_kv_heads, geometry.head_size, dtype=engine.dtype)
        if engine.device.type == "cuda":
            out = out.pin_memory()
        engine.target(uid).read_kv(layer_idx, 0, out)
        layers.append(out)
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return torch.stack(layers)


def whole_spans(num_tokens: int) -> int:
    """Tokens of the whole spans."""
    return num_tokens // SPAN_TOKENS * SPAN_TOKENS
