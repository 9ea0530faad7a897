"""Copies of batches: the same bytes whoever makes them."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest

from mii_hcache.storage import copying
from mii_hcache.storage.copying import Copying, num_copying_threads, shared_copying
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.native import why_not_built
from tests.storage.storage_kit import holds, make_record, put

SIZES = (0, 1, 4095, 32 << 10, (32 << 10) + 1, 300_000, 2_000_003)


@pytest.fixture(params=["native", "python"])
def copies(request, monkeypatch) -> Copying:
    if request.param == "python":
        monkeypatch.setattr(copying, "why_not_built", lambda: "no compiler")
    elif (why := why_not_built()) is not None:
        pytest.skip(why)
    made = Copying(3)
    assert made.is_native == (request.param == "native")
    return made


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_batch_arrives_whole_and_touches_nothing_else(copies, is_writable):
    rng = random.Random(5)
    sources = [rng.randbytes(size) for size in SIZES]
    outs = [bytearray(b"\xee" * (size + 200)) for size in SIZES]
    wrap = bytearray if is_writable else bytes
    copies.copy(
        (memoryview(out)[100 : 100 + len(source)], memoryview(wrap(source)))
        for out, source in zip(outs, sources, strict=True)
    )
    assert outs == [bytearray(b"\xee" * 100 + source + b"\xee" * 100) for source in sources]


@pytest.mark.parametrize("size", [100, 100_000])
def test_lengths_that_differ_are_refused(copies, size):
    with pytest.raises(ValueError):
        copies.copy([(memoryview(bytearray(size)), memoryview(bytes(size + 1)))])


def test_several_threads_at_once(copies):
    results: list[bool] = []

    def work(seed: int) -> None:
        source = random.Random(seed).randbytes(1 << 20)
        for _ in range(5):
            out = bytearray(1 << 20)
            copies.copy([(memoryview(out), memoryview(source))])
            results.append(out == source)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 20


def test_there_is_one_for_the_process():
    assert shared_copying() is shared_copying()
    assert shared_copying().num_threads == num_copying_threads()
    assert 2 <= num_copying_threads() <= 8


def test_a_forked_child_copies_too():
    """Its parent's threads are not there."""
    shared_copying().copy([(memoryview(bytearray(1 << 20)), memoryview(bytes(1 << 20)))])
    child = os.fork()
    if child == 0:
        out = bytearray(1 << 20)
        shared_copying().copy([(memoryview(out), memoryview(b"c" * (1 << 20)))])
        os._exit(0 if out == b"c" * (1 << 20) else 1)
    deadline_s = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline_s:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert done == (child, 0)


def test_a_store_in_memory_works_without_the_native_engine(monkeypatch):
    monkeypatch.setattr(copying, "why_not_built", lambda: "no compiler")
    monkeypatch.setattr(copying, "_shared", [Copying(2)])
    store = MemoryStore(1 << 24)
    records = [make_record(idx, chunk_bytes=100_000) for idx in range(4)]
    assert all(put(store, record) for record in records)
    assert all(holds(store, record) for record in records)
    store.close()
