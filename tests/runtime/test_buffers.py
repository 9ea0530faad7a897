"""Nobody ever holds memory that somebody else holds."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mii_hcache.runtime import buffers
from mii_hcache.runtime.buffers import RowLease, RowRing, SpanBuffers, as_bytes
from tests.runtime.kit import GIVE_UP_S

CAPACITY = 10


class RingMachine(RuleBasedStateMachine):
    """The ring against a list of which rows are taken. Each lease is stamped, and must keep its stamp."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = RowRing(num_layers=2, capacity_rows=CAPACITY, row_elements=3, dtype=torch.float32)
        self.taken: list[RowLease] = []  # in order; those at the front that are done are gone
        self.done: set[int] = set()
        self.stamp = 0.0

    def _stamp_of(self, lease: RowLease) -> float:
        return float(lease.rows[0, 0, 0])

    @rule(num_rows=st.integers(1, CAPACITY))
    def acquire(self, num_rows: int) -> None:
        is_free = [True] * CAPACITY
        for lease in self.taken:
            is_free[lease.start : lease.start + lease.num_rows] = [False] * lease.num_rows
        head = self.taken[-1].start + self.taken[-1].num_rows if self.taken else 0
        # Rows lie together: right behind the newest ones, or from the start again.
        fitting = [s for s in (head, 0) if s + num_rows <= CAPACITY and all(is_free[s : s + num_rows])]
        lease = self.ring.acquire(num_rows)
        if lease is None:
            assert not fitting
            return
        assert lease.start in fitting
        assert lease.rows.shape == (2, num_rows, 3) and lease.num_rows == num_rows
        assert lease.rows.is_contiguous(), "one copy cannot fill it"
        self.stamp += 1
        lease.rows.fill_(self.stamp)
        self.taken.append(lease)

    @precondition(lambda self: any(id(lease) not in self.done for lease in self.taken))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from([lease for lease in self.taken if id(lease) not in self.done]))
        self.ring.release(lease)
        self.done.add(id(lease))
        while self.taken and id(self.taken[0]) in self.done:
            self.done.remove(id(self.taken.pop(0)))

    @invariant()
    def every_lease_keeps_its_rows(self) -> None:
        stamps = [self._stamp_of(lease) for lease in self.taken]
        assert len(set(stamps)) == len(stamps)
        assert all((lease.rows == stamp).all() for lease, stamp in zip(self.taken, stamps, strict=True))

    @invariant()
    def rows_are_counted(self) -> None:
        assert self.ring.leased_rows == sum(lease.num_rows for lease in self.taken) <= CAPACITY

    def teardown(self) -> None:
        for lease in list(self.taken):
            self.ring.release(lease)
        assert self.ring.leased_rows == 0
        assert self.ring.acquire(CAPACITY) is not None


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def _ring() -> RowRing:
    return RowRing(num_layers=1, capacity_rows=CAPACITY, row_elements=1, dtype=torch.float32)


def _lease(ring: RowRing, num_rows: int) -> RowLease:
    lease = ring.acquire(num_rows)
    assert lease is not None
    return lease


def test_more_rows_than_the_ring_has_are_our_own_mistake():
    with pytest.raises(ValueError, match="11 rows wanted from a ring of 10"):
        _ring().acquire(CAPACITY + 1, wait_s=60)
    assert _ring().capacity_rows == CAPACITY


def test_a_full_ring_answers_at_once_unless_told_to_wait(monkeypatch):
    ring = _ring()
    _lease(ring, CAPACITY)
    with monkeypatch.context() as patch:
        patch.setattr(ring._freed, "wait", lambda timeout: pytest.fail("it waits"))
        assert ring.acquire(1) is None
    started_s = time.monotonic()
    assert ring.acquire(1, wait_s=0.1) is None
    assert 0.1 <= time.monotonic() - started_s < GIVE_UP_S


def test_a_waiting_acquire_is_woken_by_the_release_that_makes_room():
    ring = _ring()
    first, second = _lease(ring, 4), _lease(ring, 6)
    got: list[RowLease | None] = []
    waiter = threading.Thread(target=lambda: got.append(ring.acquire(5, wait_s=60)))
    waiter.start()
    ring.release(second)  # not enough: space comes back in the order in which it was taken
    waiter.join(0.05)
    assert waiter.is_alive()
    ring.release(first)
    waiter.join(GIVE_UP_S)
    assert got and got[0] is not None


def test_releases_that_make_too_little_room_do_not_prolong_the_wait():
    ring = _ring()
    leases = [_lease(ring, 1) for _ in range(CAPACITY)]
    stop = threading.Event()

    def release_slowly() -> None:
        for lease in leases[:5]:
            if stop.wait(0.04):
                return
            ring.release(lease)

    releaser = threading.Thread(target=release_slowly)
    started_s = time.monotonic()
    releaser.start()
    assert ring.acquire(8, wait_s=0.1) is None
    waited_s = time.monotonic() - started_s
    stop.set()
    releaser.join()
    assert 0.1 <= waited_s < GIVE_UP_S


def test_threads_that_release_in_any_order_never_lose_room():
    ring = RowRing(num_layers=1, capacity_rows=64, row_elements=1, dtype=torch.float32)
    queues: list[list[RowLease]] = [[], [], []]
    changed = threading.Condition()
    is_over = False

    def release_all(mine: list[RowLease]) -> None:
        while True:
            with changed:
                changed.wait_for(lambda: mine or is_over)
                if not mine:
                    return
                lease = mine.pop()  # newest first
            assert (lease.rows == lease.rows[0, 0, 0]).all(), "somebody wrote into leased rows"
            ring.release(lease)

    threads = [threading.Thread(target=release_all, args=(mine,)) for mine in queues]
    for thread in threads:
        thread.start()
    for turn in range(600):
        lease = ring.acquire(1 + turn * 7 % 40, wait_s=GIVE_UP_S)
        assert lease is not None, "room was lost"
        lease.rows.fill_(turn)
        with changed:
            queues[turn % 3].append(lease)
            changed.notify_all()
    with changed:
        is_over = True
        changed.notify_all()
    for thread in threads:
        thread.join(GIVE_UP_S)
        assert not thread.is_alive()
    assert ring.leased_rows == 0


# --- span buffers ----------------------------------------------------------------------------------------------------


def _pool(max_buffers: int) -> SpanBuffers:
    return SpanBuffers(shape=(2, 3), dtype=torch.bfloat16, max_buffers=max_buffers)


def test_a_pool_hands_out_distinct_buffers_up_to_its_bound(monkeypatch):
    pool = _pool(2)
    first, second = pool.acquire(), pool.acquire()
    assert first is not None and second is not None
    assert first.data_ptr() != second.data_ptr()
    assert first.shape == (2, 3) and first.dtype is torch.bfloat16
    assert pool.num_in_use == 2
    with monkeypatch.context() as patch:
        patch.setattr(pool._returned, "wait", lambda timeout: pytest.fail("it waits"))
        assert pool.acquire() is None
    started_s = time.monotonic()
    assert pool.acquire(wait_s=0.1) is None
    assert time.monotonic() - started_s >= 0.1
    pool.release(first)
    assert pool.num_in_use == 1
    again = pool.acquire()
    assert again is not None and again.data_ptr() == first.data_ptr()


def test_a_waiting_acquire_of_a_buffer_is_woken_by_a_release():
    pool = _pool(1)
    buffer = pool.acquire()
    assert buffer is not None
    got: list[torch.Tensor | None] = []
    waiter = threading.Thread(target=lambda: got.append(pool.acquire(wait_s=60)))
    waiter.start()
    waiter.join(0.02)
    assert waiter.is_alive()
    pool.release(buffer)
    waiter.join(GIVE_UP_S)
    assert got and got[0] is buffer


def test_memory_that_cannot_be_had_now_is_not_counted_as_handed_out(monkeypatch):
    pool = _pool(1)

    def no_memory(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(buffers, "host_empty", no_memory)
        with pytest.raises(RuntimeError, match="no memory"):
            pool.acquire()
    assert pool.num_in_use == 0
    assert pool.acquire() is not None


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_bytes_share_memory_with_the_tensor(dtype):
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    view = as_bytes(tensor)
    assert (view.nbytes, view.format, view.readonly, view.c_contiguous) == (24 * dtype.itemsize, "B", False, True)
    copy = torch.empty_like(tensor)
    as_bytes(copy)[:] = view
    assert torch.equal(copy, tensor)
    view[:] = bytes(view.nbytes)
    assert not tensor.any()


def test_bytes_of_a_slice_are_that_slice():
    tensor = torch.arange(8, dtype=torch.int32).view(4, 2)
    assert bytes(as_bytes(tensor[1:3])) == bytes(as_bytes(tensor))[8:24]


def test_bytes_keep_the_tensor_alive():
    view = as_bytes(torch.full((1 << 16,), 7, dtype=torch.uint8))
    gc.collect()
    scribble = [torch.zeros(1 << 16, dtype=torch.uint8) for _ in range(8)]
    assert bytes(view) == b"\x07" * (1 << 16) and scribble


def test_what_is_not_contiguous_has_no_bytes():
    with pytest.raises(ValueError, match="not contiguous"):
        as_bytes(torch.zeros(4, 4).T)


def test_host_memory_is_aligned_for_direct_io():
    for shape in [(3, 64, 1000), (1,), (0, 5)]:
        tensor = buffers.host_empty(*shape, dtype=torch.bfloat16)
        assert tensor.shape == shape and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 4096 == 0
