"""Whatever happens in whatever order, a span in the store holds the bytes of its own history, in every layer.

The engine reuses one buffer for every layer; ring rows and buffers are NaN before and after they belong to somebody;
the store hangs, is slow, is full, fails and forgets. Rows are a function of the whole history, so any mix-up shows.
"""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mii_hcache.config import SAVE_NAMES
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import SpanId, spans_of
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.native import why_not_built
from tests.runtime.kit import (
    GIVE_UP_S,
    SCATTERS,
    SEED,
    FakeEngine,
    FakeStore,
    geometry_of,
    kind_of,
    open_saver,
    path,
    scatter_named,
    span_chunks,
    span_record,
)

MAX_BATCH = 130
HERE = SCATTERS if why_not_built() is None else ("torch",)
GEOMETRY = geometry_of()

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


class World:
    """A saver, its engine and its store. Sequences are picked by number, modulo how many live."""

    def __init__(
        self,
        kind: ChunkKind,
        num_threads: int,
        ring_batches: int,
        scatter: str,
        save: str,
        engine: FakeEngine | None = None,
        **settings: Any,
    ) -> None:
        self.kind = kind
        self.heal_wait_s = 0.01
        self.can_hang = save != "direct"  # then it holds up the engine, as it may
        self.engine = FakeEngine(GEOMETRY, max_batch_tokens=MAX_BATCH) if engine is None else engine
        self.store = FakeStore()
        self.counters = Counters()
        self.histories: dict[SpanId, list[int]] = {}
        self.saver = open_saver(
            self.engine,
            self.store,
            kind,
            counters=self.counters,
            num_threads=num_threads,
            ring_batches=ring_batches,
            scatter=scatter_named(scatter),
            save=save,
            save_wait=0.0,
            **settings,
        )

    def do(self, verb: str, *args: Any) -> None:
        getattr(self, verb)(*args)
        for track in self.saver._tracks.values():
            if track.open_span is not None:  # then it holds all that its sequence has of its last span
                assert track.open_span.span_idx == len(track.token_ids) // SPAN_TOKENS
                assert len(track.token_ids) % SPAN_TOKENS > 0

    def _pick(self, number: int) -> int:
        uids = list(self.engine.tokens)
        if not uids:
            self.open(1, 0)
            return self._pick(number)
        return uids[number % len(uids)]

    # --- sequences

    def open(self, branch: int, num_tokens: int) -> None:
        """New, or restored: then its blocks hold tokens that the saver never saw run."""
        tokens = path(branch, 0, num_tokens)
        uid = self.engine.open(tokens)
        self.saver.open(uid, seed=SEED, token_ids=tokens)

    def truncate(self, number: int, spans_back: int, rest: int) -> None:
        uid = self._pick(number)
        length = len(self.engine.tokens[uid])
        num_tokens = min(length, max(0, length // SPAN_TOKENS - spans_back) * SPAN_TOKENS + rest)
        self._note(uid)
        self.saver.truncate(uid, num_tokens)
        self.engine.truncate(uid, num_tokens)

    def close(self, number: int, is_healed: bool) -> None:
        self._close(self._pick(number), is_healed)

    def _close(self, uid: int, is_healed: bool) -> None:
        self._note(uid)
        if is_healed:
            self.saver.heal(uid, self.heal_wait_s)
        self.saver.close(uid)
        self.engine.evict(uid)

    def _note(self, uid: int) -> None:
        tokens = list(self.engine.tokens[uid])
        for span_idx, (span_id, _) in enumerate(spans_of(SEED, tokens)):
            self.histories[span_id] = tokens[: (span_idx + 1) * SPAN_TOKENS]

    # --- steps

    def _batch(self, parts: list[tuple[int, int, int]]) -> dict[int, list[int]]:
        batch: dict[int, list[int]] = {}
        for number, branch, num_tokens in parts:
            uid = self._pick(number)
            num_tokens = min(num_tokens, MAX_BATCH - sum(map(len, batch.values())))
            if num_tokens and uid not in batch:
                batch[uid] = path(branch, len(self.engine.tokens[uid]), num_tokens)
        return batch

    def step(self, parts: list[tuple[int, int, int]]) -> None:
        self.engine.step(self.saver, self._batch(parts))

    def fill(self, number: int, branch: int, rest: int) -> None:
        """Prefill exactly to the end of a span, and `rest` tokens of the next."""
        uid = self._pick(number)
        num_tokens = SPAN_TOKENS - len(self.engine.tokens[uid]) % SPAN_TOKENS + rest
        self.step([(number, branch, num_tokens)])

    def decode(self, parts: list[tuple[int, int]], num_steps: int) -> None:
        for _ in range(num_steps):
            self.step([(number, branch, 1) for number, branch in parts])

    def fail_step(self, number: int, branch: int, num_tokens: int, layer: int) -> None:
        """The sequence of a failed step is closed, and nothing is read from its blocks."""
        uid = self._pick(number)
        self._note(uid)
        with pytest.raises(RuntimeError, match="the engine failed"):
            self.engine.step(self.saver, self._batch([(number, branch, num_tokens)]), fail_at_layer=layer)
        self.saver.close(uid)
        self.engine.evict(uid)

    def pile_up(self, number: int, branch: int, rest: int, num_spans: int) -> None:
        """More than ring and queue hold while the store hangs."""
        self.hang()
        for idx in range(num_spans):
            self.fill(number + idx, branch, rest)

    # --- the store

    def set_mode(self, mode: str) -> None:
        self.store.mode = mode

    def hang(self) -> None:
        if self.can_hang:
            self.store.put_gate.clear()

    def go_on(self) -> None:
        self.store.put_gate.set()

    def forget(self, keep: int) -> None:
        """Evicted, damaged or deleted behind our back."""
        self.store.delete(list(self.store.spans)[keep:])

    def heal(self, number: int) -> None:
        self.saver.heal(self._pick(number), self.heal_wait_s)

    def drain(self) -> None:
        self.store.put_gate.set()
        assert self.saver.drain(GIVE_UP_S)
        self.check_store()

    # --- what must hold

    def check_store(self) -> None:
        for uid in self.engine.tokens:
            self._note(uid)
        for span_id, (record, chunks) in self.store.spans.items():
            history = self.histories[span_id]
            kind = kind_of(record)
            assert record == span_record(history, kind, GEOMETRY)
            expected = span_chunks(history, kind, GEOMETRY)
            wrong = [layer for layer, chunk in enumerate(expected) if chunk != chunks[layer]]
            assert len(chunks) == len(expected) and not wrong, f"wrong bytes: {kind}, chunks {wrong}"

    def finish(self) -> None:
        """Close everything; then every whole span is there, and all memory is back."""
        self.store.mode = "ok"
        self.drain()
        for uid in list(self.engine.tokens):
            tokens = self.engine.tokens[uid]
            self._close(uid, is_healed=True)
            assert self.saver.drain(GIVE_UP_S)
            missing = [span_id for span_id, _ in spans_of(SEED, tokens) if span_id not in self.store.spans]
            assert not missing, "a drop cuts off what follows it"
        self.check_store()
        assert self.saver.num_pending == 0
        assert self.saver._cutter._kv_blocks.num_in_use == self.saver._healer._blocks.num_in_use == 0
        if self.kind is ChunkKind.HIDDEN:
            assert self.saver._cutter._open_buffers.num_in_use == 0, "an open span's buffer was lost"
            assert self.saver._capture is not None
            assert self.saver._capture.ring.leased_rows == 0, "rows of the ring were lost"


numbers = st.integers(0, 3)
branches = st.integers(1, 2)
sizes = st.sampled_from([1, 2, 11, 63, 64, 65, 128, 130])
rests = st.sampled_from([0, 0, 1, 10, 40, 63])


def _verb(name: str, *args: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(st.just(name), *args)


steps = st.one_of(
    _verb("step", st.lists(st.tuples(numbers, branches, sizes), min_size=1, max_size=3)),
    _verb("fill", numbers, branches, rests),
    _verb("pile_up", numbers, branches, rests, st.integers(2, 6)),
    _verb("decode", st.lists(st.tuples(numbers, branches), min_size=1, max_size=3), st.integers(2, 40)),
)
verbs = st.one_of(
    steps,
    steps,
    _verb("truncate", numbers, st.integers(0, 2), rests),
    st.one_of(
        _verb("open", branches, st.sampled_from([0, 0, 64, 128, 70])),
        _verb("close", numbers, st.booleans()),
        _verb("fail_step", numbers, branches, sizes, st.integers(0, GEOMETRY.num_layers - 1)),
    ),
    st.one_of(
        _verb("hang"),
        _verb("go_on"),
        _verb("drain"),
        _verb("set_mode", st.sampled_from(["ok", "slow", "full", "broken"])),
        _verb("forget", st.integers(0, 3)),
        _verb("heal", numbers),
    ),
)
scripts = st.lists(st.lists(verbs, min_size=3, max_size=10), max_size=8).map(lambda parts: [*itertools.chain(*parts)])
STALE_OPEN_SPAN = [
    ("open", 1, 0),
    ("step", [(0, 1, 10)]),
    ("truncate", 0, 0, 0),
    ("step", [(0, 2, 64)]),
    ("truncate", 0, 1, 20),
    ("step", [(0, 1, 44)]),
]
"""A span is begun, cut back to its first token, and written whole in one go: what was begun must not be continued."""


@pytest.mark.parametrize("kind", ChunkKind)
@given(
    script=scripts,
    num_threads=st.integers(1, 2),
    ring_batches=st.sampled_from([1, 2]),
    scatter=st.sampled_from(HERE),
    save=st.sampled_from([*SAVE_NAMES, "two-stage"]),
)
@example(script=STALE_OPEN_SPAN, num_threads=1, ring_batches=2, scatter=HERE[0], save="two-stage")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_span_holds_its_own_history(kind, script, num_threads, ring_batches, scatter, save):
    with mock.patch("mii_hcache.runtime.flusher.MAX_WAITING_PUTS", 1):
        world = World(kind, num_threads, ring_batches, scatter, save)
        try:
            for verb in script:
                world.do(*verb)
            world.heal_wait_s = GIVE_UP_S
            world.finish()
        finally:
            world.store.put_gate.set()
            world.saver.stop()
