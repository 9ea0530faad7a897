"""Which modules are registered, and what of a step goes to the device."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from mii_hcache.engine import compat, modules
from mii_hcache.engine.modules.batch_plan import make_plan
from mii_hcache.engine.modules.upload import ALIGNMENT, RING, StepUpload
from mii_hcache.errors import ConfigError
from mii_hcache.runtime.streams import Event, HostStream, HostStreams


def test_a_setting_and_a_device_name_the_modules(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for setting in ("auto", "portable"):
        assert modules.resolve(setting, "cpu") == "torch"
        assert modules.resolve(setting, "cuda") == "triton"
    assert modules.resolve("stock", "cuda") == "stock"
    assert not caplog.records
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert modules.resolve("auto", "cuda") == "torch"
    assert "pip install triton" in caplog.text
    with pytest.raises(ConfigError, match="got 'fast'"):
        modules.resolve("fast", "cuda")


class LateEvent(Event):
    """Done once somebody has waited for it."""

    passed_s = 0.0

    def __init__(self, late: LateStream) -> None:
        self._late, self._num_copies = late, len(late.copies)

    @property
    def is_done(self) -> bool:
        return self._late.num_done >= self._num_copies

    def synchronize(self) -> None:
        self._late.run_to(self._num_copies)


class LateStream(HostStream):
    """Copies move their bytes as late as events allow."""

    def __init__(self) -> None:
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_done = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.copies.append((target, source))

    def record(self, *, is_timed: bool = False) -> Event:
        return LateEvent(self)

    def run_to(self, num_copies: int) -> None:
        while self.num_done < num_copies:
            target, source = self.copies[self.num_done]
            target.copy_(source)
            self.num_done += 1


def test_steps_that_run_ahead_of_the_device_do_not_overwrite_what_is_on_its_way():
    streams = HostStreams()
    streams.main = late = LateStream()
    upload = StepUpload(torch.device("cpu"), streams)
    sent = []
    for step in range(2 * RING):
        arrays = [torch.full((3,), step), torch.full((step + 1, 2), step, dtype=torch.int32)]
        views = upload.send(arrays)
        assert all(view.data_ptr() % ALIGNMENT == 0 for view in views)
        sent.append((arrays, views, len(late.copies)))
    assert late.num_done == RING, "the host waited for the buffers that it wrote again, and for no others"
    for arrays, views, num_copies in sent[RING:]:
        late.run_to(num_copies)
        assert all(torch.equal(view, array) for view, array in zip(views, arrays, strict=True))
    assert len(late.copies) == 2 * RING, "one copy a step"


def test_arrays_that_outgrow_the_buffers_wait_for_them():
    streams = HostStreams()
    streams.main = late = LateStream()
    upload = StepUpload(torch.device("cpu"), streams)
    upload.send([torch.arange(10)])
    large = torch.arange(100_000)
    (view,) = upload.send([large])
    assert late.num_done == 1
    late.run_to(2)
    assert torch.equal(view, large)


def test_a_plan_says_where_every_row_is():
    chance = random.Random(3)
    descriptors, tables, start = [], [], 0
    for seen, count in ((0, 1), (15, 1), (16, 5), (0, 40), (100, 33)):
        descriptors.append((start, count, seen))
        tables.append(torch.tensor(chance.sample(range(50), k=12), dtype=torch.int32))
        start += count
    token_ids = torch.arange(start)
    plan = make_plan(descriptors, tables, 16, StepUpload(torch.device("cpu")), token_ids, [torch.tensor([7])])
    for (first, count, seen), table, last, sequence in zip(
        descriptors, tables, plan.last_rows.tolist(), plan.sequences, strict=True
    ):
        assert last == first + count - 1
        assert (sequence.start, sequence.num_tokens, sequence.num_seen) == (first, count, seen)
        assert torch.equal(sequence.block_ids, table[: -(-(seen + count) // 16)])
        for row in range(count):
            position = seen + row
            assert plan.positions[first + row] == position
            assert plan.slots[first + row] == int(table[position // 16]) * 16 + position % 16
    assert torch.equal(plan.token_ids, token_ids) and plan.extra[0].item() == 7


class Watched(Event):
    """Says what it sees when it is waited for."""

    is_done, passed_s = False, 0.0

    def __init__(self, look: Callable[[], None]) -> None:
        self.synchronize = look  # type: ignore[method-assign]

    def synchronize(self) -> None:
        raise NotImplementedError


def test_the_hosts_pinned_buffers_are_written_again_only_once_their_copies_are_over():
    compat.install()
    from deepspeed.inference.v2.ragged.manager_configs import DSStateManagerConfig

    from mii_hcache.engine.ragged_batch import StepBatch

    streams, seen = HostStreams(), []
    batch = StepBatch(DSStateManagerConfig(), streams, for_stock=True)
    look = lambda: seen.append(batch.input_ids(on_device=False)[:3].tolist())  # noqa: E731
    streams.main.record = lambda: Watched(look)  # type: ignore[method-assign]
    sequence = SimpleNamespace(seen_tokens=5, kv_blocks_ptr=64)
    for token_ids in ([1, 2, 3], [4, 5, 6]):
        batch.clear()
        batch.insert_sequence(sequence, torch.tensor(token_ids), do_checks=False)
        batch.finalize()
        assert batch.descriptors == [(0, 3, 5)] and batch.table_pointers == [64]
        assert batch.token_ids.tolist() == batch.input_ids().tolist() == token_ids
    assert seen == [[1, 2, 3]]
