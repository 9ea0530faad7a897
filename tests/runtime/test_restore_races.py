"""Restores on a device whose streams run late and out of order bring back every byte, and every wait is needed."""

from __future__ import annotations

import random
import time
from contextlib import closing

import pytest

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime.pieces import HOST
from mii_hcache.runtime.restore import MAX_FILLS_AHEAD, Restore
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Event, HostStream, HostStreams
from tests.runtime.device_kit import Device, PoolBlocks, device_restorer, text_of, waits_in
from tests.runtime.kit import GIVE_UP_S, FakeBlocks, FakeEngine, FakeStore, geometry_of, path, wait_until

HIDDEN, KV = ChunkKind.HIDDEN, ChunkKind.KV
MAX_SPANS = 9


class _Sequence:
    """One context that is restored, used, and evicted."""

    def __init__(self, device: Device, restorer, store: FakeStore, branch: int) -> None:
        chooser, geometry = device.chooser, device.engine.geometry
        self.kinds = [chooser.choice([HIDDEN, HIDDEN, KV]) for _ in range(chooser.randint(1, MAX_SPANS))]
        self.tokens = path(branch, 0, len(self.kinds) * SPAN_TOKENS)
        records = store.add(self.tokens, self.kinds, geometry)
        self.ids = [record.span_id for record in records]
        self.num_recomputed = chooser.choice([0, 0, chooser.randint(0, len(self.kinds))])
        self.num_layers = chooser.choice([0, 0, 0, 2])
        self.blocks = PoolBlocks(device.pool, len(self.tokens))
        self.restore: Restore = restorer.start(
            self.blocks,
            records,
            self.tokens,
            recompute_tokens=self.num_recomputed * SPAN_TOKENS,
            recompute_layers=self.num_layers,
        )
        if chooser.random() < 0.6:
            # Tiles that are there before anything is filled: who has seen a fill done knows what the main stream did
            # before it, and misses no other wait for that.
            self.restore.read_ahead()
            wait_until(lambda: all(read.outcome.done() for read in self.restore._reads))
        if chooser.random() < 0.2:
            span_idx = chooser.randrange(len(self.kinds))
            layer_idx = chooser.choice(list(geometry.saved_layers(self.kinds[span_idx])))
            store.damage[self.ids[span_idx], layer_idx] = chooser.choice(["corrupt", "missing"])

    def source(self, layer_idx: int, position: int) -> str:
        span_idx = position // SPAN_TOKENS
        if span_idx < self.num_recomputed or layer_idx < self.num_layers:
            return "tokens"
        kind = self.kinds[span_idx]
        return "tokens" if kind is HIDDEN and layer_idx == 0 else kind.value

    def use(self, chooser: random.Random) -> None:
        """Other forwards on the main stream, with its blocks: it reads them, and prefills what was cut off."""
        self.blocks.check(self.tokens, self.source)
        behind = self.blocks.slots[self.blocks.committed :]
        self.blocks.pool.rows[:, behind] = 1.0
        assert not self.blocks.pool.rows[:, behind].isnan().any()


def _talk(device: Device, *, num_sequences: int = 5) -> None:
    """Restores side by side on the engine thread, cancelled at times, while the main stream uses other blocks."""
    chooser, streams = device.chooser, device.streams
    store = FakeStore()
    with streams.watching():
        restorer = device_restorer(streams, device.engine, store, tile_spans=chooser.randint(1, 4), read_ahead_bytes=1)
        with closing(_Stopper(restorer, store)):
            live: list[_Sequence] = []
            present: list[_Sequence] = []
            branch = 0
            while branch < num_sequences or live:
                if branch < num_sequences and len(live) < 3 and chooser.random() < 0.3:
                    branch += 1
                    live.append(_Sequence(device, restorer, store, branch))
                for sequence in list(live):
                    # Only where it could go on: a slow machine asks it more often, and shall not cancel all of them.
                    if sequence.restore.can_work and chooser.random() < 0.04:
                        sequence.restore.cancel()
                        sequence.blocks.give_back()
                        live.remove(sequence)
                    elif sequence.restore.step(0.0, wait=chooser.random() < 0.5) is not None:
                        live.remove(sequence)
                        present.append(sequence)
                        sequence.use(chooser)
                for sequence in list(present):
                    sequence.blocks.check(sequence.tokens, sequence.source)
                    if chooser.random() < 0.3:
                        present.remove(sequence)
                        sequence.blocks.give_back()
            for sequence in present:
                sequence.blocks.check(sequence.tokens, sequence.source)
                sequence.blocks.give_back()
            streams.run_all()
            restorer.collect()
            wait_until(lambda: restorer.buffers.num_in_use == 0)
    assert not streams.checker.races
    assert device.pool.rows.isnan().all()


class _Stopper:
    def __init__(self, restorer, store) -> None:
        self._restorer, self._store = restorer, store

    def close(self) -> None:
        self._restorer.streams._ignored = None
        self._restorer.stop()


@pytest.mark.parametrize("seed", range(40))
def test_every_byte_is_there_when_the_main_stream_looks(seed):
    device = Device(seed)
    _talk(device)
    assert device.streams.checker.num_accesses > 100


WAITS = [
    (file, line, stream)
    for file, line in [*waits_in("placing.py", {"wait"}), *waits_in("held_memory.py", {"is_done"})]
    for stream in (("side stream 0", "side stream 1") if "_begun" in text_of(file, line) else ("",))
]


def test_there_are_waits_to_be_left_out():
    assert len(WAITS) == 8


@pytest.mark.parametrize(("file", "line", "stream"), WAITS)
def test_no_wait_can_be_left_out(file, line, stream):
    for seed in range(120):
        device = Device(seed, ignored=(file, line, stream))
        try:
            _talk(device)
        except AssertionError:
            if not device.streams.checker.races:  # which a thread may have been told of that nobody waits for
                raise
            assert device.streams.num_ignored
            return
    pytest.fail(f"nobody misses the wait in {file}, line {line}")


@pytest.mark.parametrize("wait", ["compute.wait(copied)", "self._main.wait(self._projected)", "is_done"])
def test_a_wait_that_is_left_out_gives_wrong_bytes(wait):
    """Also to who keeps no clocks: what is launched on side streams really happens late."""
    (left_out,) = [place for place in WAITS if wait in text_of(*place[:2])]
    for seed in range(40):
        device = Device(seed, ignored=left_out)
        device.streams.checker.is_silent = True
        try:
            _talk(device)
        except AssertionError as error:
            if str(error).startswith("layer "):
                return
    pytest.fail("whatever is read too early is there by chance")


def test_a_device_that_is_late_bounds_what_is_read_ahead_and_holds_up_nobody():
    """Nothing is done there until somebody insists."""
    device, store = Device(1), FakeStore()
    device.streams.haste = 0.0
    tokens = path(1, 0, MAX_SPANS * SPAN_TOKENS)
    records = store.add(tokens, [HIDDEN] * MAX_SPANS, device.engine.geometry)
    with device.streams.watching():
        restorer = device_restorer(device.streams, device.engine, store, tile_spans=1, read_ahead_bytes=1)
        blocks = PoolBlocks(device.pool, len(tokens))
        restore = restorer.start(blocks, records, tokens)
        started_s = time.monotonic()
        while restore._source.num_held < restorer.tiles_ahead:
            assert restore.step(0.01, wait=True) is None
        for wait in (False, True):
            for _ in range(20):
                assert restore.step(0.01, wait=wait) is None
                assert restorer.buffers.num_in_use <= restorer.tiles_ahead
        assert time.monotonic() - started_s < GIVE_UP_S
        assert blocks.committed is None and not restore.can_work and not restore.is_settled
        device.streams.haste = 0.5
        while (outcome := restore.step(0.1, wait=True)) is None:
            pass
        assert outcome.num_tokens == blocks.committed == len(tokens)
        blocks.check(tokens, lambda layer_idx, position: "hidden" if layer_idx else "tokens")
        while not restore.is_settled:
            pass
        assert restore.timeline.busy_s("load") > 0 and restore.timeline.busy_s("project") > 0
        restorer.stop()
        assert restorer.buffers.num_in_use == 0


class _LateMain(HostStreams):
    """A main stream that is behind."""

    class Moment(Event):
        is_done = False
        passed_s = 0.0

        def synchronize(self) -> None:
            raise AssertionError("nobody may wait")

    class Main(HostStream):
        def record(self, *, is_timed: bool = False) -> Event:
            return _LateMain.Moment()

    def __init__(self) -> None:
        self.main = _LateMain.Main()


def test_fills_do_not_pile_up_before_others_steps(monkeypatch):
    engine, store = FakeEngine(geometry_of()), FakeStore()
    tokens = path(1, 0, 8 * SPAN_TOKENS)
    records = store.add(tokens, [KV] * 8, engine.geometry)
    target = FakeBlocks(engine)
    restorer = Restorer(adapter=engine, store=store, counters=Counters(), streams=_LateMain())
    restore = restorer.start(target, records, tokens, recompute_tokens=len(tokens))
    for wait in (False, True):
        for _ in range(5):
            assert restore.step(0.005, wait=wait) is None
    assert len(target.filled_ids) == MAX_FILLS_AHEAD * HOST.shared_fill_tokens
    monkeypatch.setattr(_LateMain.Moment, "is_done", True)
    while restore.step(1.0, wait=True) is None:
        pass
    assert target.filled_ids == tokens and target.committed == [len(tokens)]
    restorer.stop()
