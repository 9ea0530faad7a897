"""On a device where everything happens late, what is saved is what was computed; without any one of the waits, not.

The engine's norm output, its blocks, the stage, the ring and the buffers are all used again and again, and hold NaN
between whiles. `test_saver_any_order` does the same where everything happens at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime import stage as stage_module
from mii_hcache.runtime.block_reader import BlockReader
from mii_hcache.runtime.buffers import RowLease
from mii_hcache.runtime.capture import StagedCapture
from mii_hcache.runtime.saver import Saver, stage_bytes
from tests.fake_device import FakeStreams
from tests.runtime.delayed_streams import DelayedStreams
from tests.runtime.kit import GIVE_UP_S, FakeBlocks, FakeEngine, geometry_of, history_hashes, rows_of
from tests.runtime.test_saver_any_order import HERE, MAX_BATCH, World

GEOMETRY = geometry_of()
BLOCK_SIZE = 16
NUM_BLOCKS = 1024
NUM_SEEDS = 25

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


class DeviceEngine(FakeEngine):
    """Computes on streams, and keeps K and V in blocks that go from one sequence to the next."""

    def __init__(self, streams: DelayedStreams) -> None:
        super().__init__(GEOMETRY, max_batch_tokens=MAX_BATCH)
        self.streams = streams
        self.main = streams.main
        self.gathers = streams.main
        width = GEOMETRY.row_elements(ChunkKind.KV)
        self.pool = torch.full((GEOMETRY.num_layers, NUM_BLOCKS * BLOCK_SIZE, width), float("nan"))
        self.free_blocks = list(range(NUM_BLOCKS))
        self.blocks: dict[int, list[int]] = {}
        self.misread: list[int] = []
        """Layers whose projection read something else than the norm wrote."""

    def open(self, token_ids: Sequence[int] = ()) -> int:
        uid = super().open(token_ids)
        self.blocks[uid] = []
        self._write_blocks(uid, 0)
        return uid

    def truncate(self, uid: int, num_tokens: int) -> None:
        super().truncate(uid, num_tokens)

    def evict(self, uid: int) -> None:
        super().evict(uid)
        freed = self.blocks.pop(uid)
        slots = torch.tensor([block * BLOCK_SIZE + row for block in freed for row in range(BLOCK_SIZE)]).long()
        self.main.launch(partial(self.pool.index_fill_, 1, slots, float("nan")))
        self.free_blocks += freed

    def slots(self, uid: int, start: int, stop: int) -> torch.Tensor:
        blocks = self.blocks[uid]
        return torch.tensor([blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in range(start, stop)])

    def target(self, uid: int) -> DeviceBlocks:
        return DeviceBlocks(self, uid)

    def _write_blocks(self, uid: int, start: int) -> None:
        hashes = self.hashes[uid]
        while len(self.blocks[uid]) * BLOCK_SIZE < len(hashes):
            self.blocks[uid].append(self.free_blocks.pop())
        slots = self.slots(uid, start, len(hashes))
        for layer_idx in range(GEOMETRY.num_layers if len(slots) else 0):
            rows = rows_of(hashes[start:], ChunkKind.KV, layer_idx, GEOMETRY)
            self.main.launch(partial(self.pool[layer_idx].index_copy_, 0, slots, rows))

    def _forward(self, saver: Saver, batch: dict[int, list[int]], fail_at_layer: int | None) -> None:
        hashes: list[int] = []
        starts = {uid: len(self.hashes[uid]) for uid in batch}
        for uid, tokens in batch.items():
            new = history_hashes(tokens, self.hashes[uid][-1] if self.hashes[uid] else 0)
            hashes += new
            self.hashes[uid] += new
            self.tokens[uid] += tokens
        wanted = [saver.rows_for(layer_idx, len(hashes)) for layer_idx in range(GEOMETRY.num_layers)]
        for rows in wanted:
            if rows is not None:
                self.main.launch(partial(rows.fill_, float("nan")))
        for layer_idx in range(GEOMETRY.num_layers):
            if layer_idx == fail_at_layer:
                raise RuntimeError("the engine failed")
            hidden = self.norm_output(saver, layer_idx, len(hashes))
            normed = rows_of(hashes, ChunkKind.HIDDEN, layer_idx, GEOMETRY)
            self.main.launch(partial(hidden.copy_, normed))
            saver.tap(layer_idx, hidden)
            self.main.launch(partial(self._project, layer_idx, hidden, normed))
            self.main.launch(partial(self._norm_out.fill_, float("nan")))
        for uid, start in starts.items():
            self._write_blocks(uid, start)

    def _project(self, layer_idx: int, hidden: torch.Tensor, normed: torch.Tensor) -> None:
        if not torch.equal(hidden, normed):
            self.misread.append(layer_idx)


class DeviceBlocks(FakeBlocks):
    _engine: DeviceEngine

    def gather_kv(self, layers: Sequence[int], start: int, out: torch.Tensor) -> None:
        engine = self._engine
        assert self._uid is not None
        slots = engine.slots(self._uid, start, start + out.shape[1])
        engine.gathers.launch(partial(_gather, engine.pool, list(layers), slots, out))


def _gather(pool: torch.Tensor, layers: list[int], slots: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(pool[layers][:, slots].view(out.shape))


# --- what a session does ----------------------------------------------------------------------------------------------


def _script(seed: int) -> list[tuple[Any, ...]]:
    """Sequences prefill, decode together, go back, fail, leave and come again."""
    chooser = random.Random(seed)
    sizes = (1, 1, 2, 11, 63, 64, 65, 128, MAX_BATCH)
    script: list[tuple[Any, ...]] = [("open", branch, chooser.choice((0, 0, 70))) for branch in (1, 2, 1)]
    for _ in range(25):
        number, branch = chooser.randrange(4), chooser.randint(1, 2)
        script.append(
            chooser.choice(
                [
                    ("step", [(idx, branch, chooser.choice(sizes)) for idx in range(3)]),
                    ("step", [(number, branch, chooser.choice(sizes))]),
                    ("fill", number, branch, chooser.choice((0, 0, 1, 40))),
                    ("decode", [(idx, branch) for idx in range(3)], chooser.randint(1, 30)),
                    ("truncate", number, chooser.randrange(3), chooser.choice((0, 10, 63))),
                    ("fail_step", number, branch, chooser.choice(sizes), chooser.randrange(GEOMETRY.num_layers)),
                    ("heal", number),
                    ("forget", chooser.randrange(4)),
                    ("close", number, True),
                    ("open", branch, chooser.choice((0, 64, 70))),
                    ("drain",),
                ]
            )
        )
    return script


def _tight_stage(geometry: Any, plan: StoragePlan, num_hidden: int, max_batch_tokens: int) -> int:
    """As small as it may be: a batch, or a span to be healed. Every byte is used again at once."""
    batch = max_batch_tokens * (num_hidden + 1) * geometry.row_bytes(ChunkKind.HIDDEN)
    return max(batch, SPAN_TOKENS * geometry.num_layers * geometry.row_bytes(ChunkKind.KV)) + 512


def _race(
    seed: int,
    kind: ChunkKind,
    *,
    is_tight: bool = True,
    sabotage: Callable[[World], None] | None = None,
    checked: FakeStreams | None = None,
) -> None:
    """A session on a device of its own; everything that was saved is compared at its end. `checked`: on the device that
    keeps clocks (`tests/fake_device.py`), which looks at the stage."""
    streams: Any = DelayedStreams(seed) if checked is None else checked
    size = _tight_stage if is_tight else stage_bytes
    with (
        mock.patch("mii_hcache.runtime.flusher.MAX_WAITING_PUTS", 1),
        mock.patch("mii_hcache.runtime.saver.stage_bytes", size),
    ):
        save = "direct" if seed % 5 == 4 else "two-stage"
        engine = DeviceEngine(streams)
        world = World(kind, 1 + seed % 2, 1 + seed % 3, HERE[seed % len(HERE)], save, engine=engine, streams=streams)
    if sabotage is not None:
        sabotage(world)
    if checked is not None:
        stage = world.saver._healer._blocks._stage
        assert stage is not None
        checked.checker.watch(stage._memory, "the stage", checked.main.actor)
    try:
        with nullcontext() if checked is None else checked.watching():
            for verb in _script(seed):
                world.do(*verb)
            world.heal_wait_s = GIVE_UP_S if sabotage is None else 5.0  # some never give a buffer back
            world.finish()
        streams.run_all()
        assert not engine.misread, f"wrong bytes: the projections of layers {engine.misread} read them"
    finally:
        world.store.put_gate.set()
        world.saver.stop()


@pytest.mark.parametrize("kind", ChunkKind)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_what_is_saved_is_what_was_computed_however_late(kind, seed):
    _race(seed, kind, is_tight=seed % 4 != 0)


# --- what each wait is for --------------------------------------------------------------------------------------------


def _forget_ready(world: World) -> None:
    capture = world.saver._capture
    assert capture is not None
    real = capture._send

    def send(lease: RowLease) -> None:
        real(lease)

    capture._send = send  # type: ignore[method-assign]


def _forget_read(reader: BlockReader) -> None:
    real = reader.read
    reader.read = lambda *args: None if real(*args) is None else []  # type: ignore[method-assign]


def _forget_wait(stream: Any) -> None:
    stream.wait = lambda event: None


def _copy_elsewhere(world: World) -> None:
    capture = world.saver._capture
    assert isinstance(capture, StagedCapture)
    capture._main = world.engine.streams.new()


def _copy_nothing(world: World) -> None:
    world.saver._capture._copy = lambda rows, hidden: None


def _one_place_for_all(world: World) -> None:
    """The next norm writes where this layer's rows have not left yet."""
    capture = world.saver._capture
    real = capture._place
    capture._place = lambda lease: [real(lease)[0]] * GEOMETRY.num_layers


def _gather_elsewhere(world: World) -> None:
    """A copy straight from the blocks, on a stream that frees do not wait for."""
    stage = world.saver._healer._blocks._stage
    assert stage is not None
    world.engine.gathers = stage._copies


SABOTAGE: dict[str, tuple[ChunkKind, Callable[[World], None]]] = {
    "the main stream does not wait for what is sent": (
        ChunkKind.HIDDEN,
        lambda world: _forget_wait(world.engine.main),
    ),
    "rows are sent before they are there": (
        ChunkKind.HIDDEN,
        lambda world: _forget_wait(world.saver._capture._stage._copies),
    ),
    "K and V are sent before they are there": (
        ChunkKind.KV,
        lambda world: _forget_wait(world.saver._healer._blocks._stage._copies),
    ),
    "nobody waits for the rows": (ChunkKind.HIDDEN, _forget_ready),
    "nobody waits for K and V": (ChunkKind.KV, lambda world: _forget_read(world.saver._cutter._kv_blocks)),
    "nobody waits for what is healed": (ChunkKind.HIDDEN, lambda world: _forget_read(world.saver._healer._blocks)),
    "a layer's rows are not copied in the engine's order": (ChunkKind.HIDDEN, _copy_elsewhere),
    "what a norm wrote elsewhere is not copied": (ChunkKind.HIDDEN, _copy_nothing),
    "all layers' rows are written at one place": (ChunkKind.HIDDEN, _one_place_for_all),
    "blocks are read while others may get them": (ChunkKind.KV, _gather_elsewhere),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("what", SABOTAGE)
def test_without_any_one_of_its_waits_it_saves_nonsense(what):
    kind, sabotage = SABOTAGE[what]
    for seed in range(8 * NUM_SEEDS):  # the first few do, as a rule
        try:
            _race(seed, kind, sabotage=sabotage)
        except AssertionError as error:
            assert "wrong bytes" in str(error), "it fails for another reason"
            return
    pytest.fail("nobody noticed")


# --- on the device that keeps clocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ChunkKind)
@pytest.mark.parametrize("seed", range(6))
def test_everything_that_touches_the_stage_is_put_in_order(seed, kind):
    streams = FakeStreams(seed)
    _race(seed, kind, checked=streams)
    assert not streams.checker.races and streams.checker.num_accesses


WAITS = ["self._main.wait(before)", "self._copies.wait(self._main.record())"]


@pytest.mark.parametrize("kind", ChunkKind)
@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_that_is_left_out_is_told_of(wait, kind):
    """Also where the bytes happen to come in time."""
    lines = Path(stage_module.__file__).read_text(encoding="utf-8").splitlines()
    assert sum(".wait(" in line for line in lines) == len(WAITS), "a wait that is not tried here"
    (number,) = [number for number, line in enumerate(lines, start=1) if wait in line]
    for seed in range(NUM_SEEDS):
        streams = FakeStreams(seed, ignored=("runtime/stage.py", number, ""))
        with suppress(AssertionError):
            _race(seed, kind, checked=streams)
        if any(race.startswith("the stage") for race in streams.checker.races):
            return
    pytest.fail("nobody noticed")
