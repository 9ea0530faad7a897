"""Restores on a device whose streams run late and out of order bring back every byte, and every wait is needed."""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime.restore import Restore
from tests.races import RaceError
from tests.runtime.device_kit import Device, PoolBlocks, device_restorer, text_of, waits_in
from tests.runtime.kit import FakeStore, path, wait_until

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
                    if chooser.random() < 0.02:
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
    for file, line in [*waits_in("placing.py", {"wait"}), *waits_in("restorer.py", {"is_done"})]
    for stream in (("side stream 0", "side stream 1") if "_begun" in text_of(file, line) else ("",))
]


def test_there_are_waits_to_be_left_out():
    assert len(WAITS) == 8


@pytest.mark.parametrize(("file", "line", "stream"), WAITS)
def test_no_wait_can_be_left_out(file, line, stream):
    for seed in range(60):
        device = Device(seed, ignored=(file, line, stream))
        try:
            _talk(device)
        except RaceError:
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
