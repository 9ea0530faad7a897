"""Pinned memory is pinned, copies run behind the caller's back and in order, and many are as right as one."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
import torch

from mii_hcache.runtime.buffers import host_empty
from mii_hcache.runtime.gpu_copy import open_gpu_copies
from mii_hcache.runtime.streams import streams_of

LONG_CYCLES = 200_000_000
"""A tenth of a second."""


def asleep(device):
    """A stream of its own that sleeps."""
    stream = streams_of(device).new()
    stream.launch(lambda: torch.cuda._sleep(LONG_CYCLES))
    return stream


@pytest.mark.parametrize("num_bytes", [1, 4096, 1 << 20, (100 << 20) + 5])
def test_host_memory_is_pinned_aligned_and_whole(num_bytes):
    memory = host_empty(num_bytes, dtype=torch.uint8)
    assert memory.is_pinned() and memory.data_ptr() % 4096 == 0 and memory.numel() == num_bytes
    memory.fill_(7)
    assert int(memory.cuda().sum()) == 7 * num_bytes


@pytest.mark.parametrize("is_up", [True, False])
def test_copies_do_not_hold_up_the_caller(device, is_up):
    host = host_empty(64 << 20, dtype=torch.uint8)
    host.random_(0, 256)
    other = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    other.random_(0, 256)
    before = other.cpu()
    torch.cuda.synchronize(device)
    stream = asleep(device)
    started_s = time.perf_counter()
    stream.copy(*((other, host) if is_up else (host, other)))
    event = stream.record()
    launched_s = time.perf_counter() - started_s
    assert launched_s < 0.05 and not event.is_done, "the copy waited for the stream: the memory is not pinned"
    event.synchronize()
    assert torch.equal(other.cpu(), host) and (is_up or torch.equal(host, before))


def test_many_copies_are_as_right_as_one_by_one(device):
    """Neighbours, gaps, odd lengths, and more of them than a queue holds."""
    chance = random.Random(0)
    host = host_empty(32 << 20, dtype=torch.uint8)
    host.random_(0, 256)
    cuts = sorted(chance.sample(range(host.numel()), 4001))
    pieces = [(start, stop) for start, stop in pairwise(cuts) if chance.random() < 0.8]
    shift = 512 << 10
    target = torch.zeros(host.numel() + shift, dtype=torch.uint8, device=device)
    wanted = torch.zeros(host.numel() + shift, dtype=torch.uint8)
    for start, stop in pieces:
        wanted[shift + start : shift + stop] = host[start:stop]
    stream = asleep(device)
    stream.copy_many([(target[shift + start : shift + stop], host[start:stop]) for start, stop in pieces])
    stream.record().synchronize()
    assert torch.equal(target.cpu(), wanted)


def test_the_drivers_batches_are_as_right(device):
    copies = open_gpu_copies(device)
    if copies is None:
        pytest.skip("the native engine cannot copy to this GPU (the log says why)")
    try:
        print(f"copies go {copies.how}")
        host = host_empty(1024, 4096, dtype=torch.float16)
        host.normal_()
        target = torch.zeros(1024, 4096, dtype=torch.float16, device=device)
        order = list(range(1024))
        random.Random(1).shuffle(order)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG_CYCLES)
        left = copies.copy([(target[1023 - idx], host[idx]) for idx in order], stream.cuda_stream)
        assert left == [] and not stream.query()
        stream.synchronize()
        assert torch.equal(target.cpu(), host.flip(0))
    finally:
        copies.close()


def test_streams_wait_for_each_other(device):
    """What is launched behind a wait sees what was launched before the event."""
    streams = streams_of(device)
    first, second = streams.new(), streams.new(is_urgent=True)
    value, seen = torch.zeros(1 << 20, device=device), torch.zeros(1 << 20, device=device)
    for turn in range(1, 21):
        first.wait(second.record())
        first.launch(lambda: torch.cuda._sleep(1_000_000))
        first.launch(lambda turn=turn: value.fill_(float(turn)))
        second.wait(first.record())
        second.launch(lambda: seen.copy_(value))
        streams.main.wait(second.record())
        assert float(seen.min()) == float(seen.max()) == turn
