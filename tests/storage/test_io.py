"""Both ways to the disk: the same bytes in the same places, whichever wrote them and whichever reads them."""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import os
import random
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.errors import ConfigError
from mii_hcache.storage import native, open_io
from mii_hcache.storage.disk_io import DiskIO, SlotRead, SlotWrite, ThreadsIO
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.records import ChunkRead
from mii_hcache.storage.state_dir import StateDir
from tests.storage.faults import inject
from tests.storage.storage_kit import SPAN_DISK_BYTES, holds, make_chunks, make_record, put, wait_until

WHY_NO_URING = native.why_no_uring()
needs_uring = pytest.mark.skipif(WHY_NO_URING is not None, reason=str(WHY_NO_URING))
BACKENDS = ["threads", pytest.param("uring", marks=needs_uring)]


def new_file(io: DiskIO, path):
    return io.open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def aligned_copy(payload: bytes) -> memoryview:
    memory = memoryview(mmap.mmap(-1, max(1, len(payload))))[: len(payload)]
    memory[:] = payload
    return memory


@given(
    sizes=st.lists(
        st.sampled_from([1, 4095, 4096, 5000, 61_440, 61_441, 65_536, 70_001, 524_288]), min_size=1, max_size=5
    ),
    is_aligned=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
@needs_uring
def test_both_write_and_read_the_same(tmp_path_factory, sizes, is_aligned, seed):
    folder = tmp_path_factory.mktemp("io")
    rng = random.Random(seed)
    payloads = [rng.randbytes(size) for size in sizes]
    headers = [rng.randbytes(4096) for _ in sizes]
    starts = [4096 + sum(4096 + -(-size // 4096) * 4096 for size in sizes[:idx]) for idx in range(len(sizes))]
    with closing(open_io.open_io("uring")[0]) as uring, closing(ThreadsIO()) as threads:
        for name, io in (("uring", uring), ("threads", threads)):
            file = new_file(io, folder / name)
            as_given = [aligned_copy(payload) if is_aligned else memoryview(payload) for payload in payloads]
            io.write([SlotWrite(file, *slot) for slot in zip(starts, headers, as_given, strict=True)])
            file.close()
        assert (folder / "uring").read_bytes() == (folder / "threads").read_bytes()
        for io, name in ((uring, "threads"), (threads, "uring")):
            file = new_file(io, folder / name)
            outs = [aligned_copy(bytes(size)) if is_aligned else memoryview(bytearray(size)) for size in sizes]
            with io.read([SlotRead(file, *slot) for slot in zip(starts, outs, strict=True)]) as arriving:
                assert [bytes(arriving.finish(idx)) for idx in range(len(sizes))] == headers
            assert outs == payloads
            file.close()


@pytest.mark.parametrize("io_name", BACKENDS)
@pytest.mark.parametrize("size", [5000, 70_001, 131_072])
def test_a_slot_that_ends_early_is_told_from_one_that_is_there(tmp_path, io_name, size):
    with closing(open_io.open_io(io_name)[0]) as io:
        file = new_file(io, tmp_path / "file")
        payload = memoryview(random.Random(1).randbytes(size))
        io.write([SlotWrite(file, 4096, bytes(4096), payload)])
        for length in (0, 4096, 4097, 8192, 8192 + size - 4097):
            os.ftruncate(file.fd, length)
            with io.read([SlotRead(file, 4096, memoryview(bytearray(size)))]) as arriving:
                assert arriving.finish(0) is None
        file.close()


@pytest.mark.parametrize("io_name", BACKENDS)
def test_errors_are_those_of_the_file(tmp_path, io_name):
    with closing(open_io.open_io(io_name)[0]) as io:
        full = io.open(os.open("/dev/full", os.O_RDWR))
        with pytest.raises(OSError) as raised:
            io.write([SlotWrite(full, 0, bytes(4096), memoryview(bytes(9000)))])
        assert raised.value.errno == errno.ENOSPC
        full.close()


@pytest.mark.parametrize(("writer", "reader"), [("threads", "uring"), ("uring", "threads")])
@needs_uring
def test_a_store_may_change_its_backend(tmp_path, writer, reader):
    records = [make_record(idx, chunk_bytes=size) for idx, size in enumerate([5000, 100_000, 131_072])]
    for io in (writer, reader):
        with closing(StateDir(tmp_path)) as state_dir, closing(FileStore(state_dir, 1 << 26, io=io)) as store:
            assert store.io.name == io
            for record in records:
                assert put(store, record)
                assert holds(store, record)
            assert store.stats().put_bytes == (0 if io == reader else sum(record.num_bytes for record in records))


@needs_uring
def test_buffers_are_left_alone_once_a_batch_is_closed(tmp_path):
    """A reader that gives up early (a wrong chunk, Ctrl-C) may use its buffers for something else at once."""
    with closing(open_io.open_io("uring")[0]) as io:
        file = new_file(io, tmp_path / "file")
        payload = memoryview(random.Random(2).randbytes(1 << 19))
        slots = [(idx * (4096 + len(payload)), bytes(4096), payload) for idx in range(64)]
        io.write([SlotWrite(file, *slot) for slot in slots])
        for _ in range(5):
            outs = [aligned_copy(bytes(len(payload))) for _ in slots]
            arriving = io.read([SlotRead(file, slot[0], out) for slot, out in zip(slots, outs, strict=True)])
            arriving.close()
            arriving.close()
            for out in outs:
                out[:] = bytes(len(out))
            assert all(bytes(out).count(0) == len(out) for out in outs)
        file.close()


@needs_uring
def test_engines_end_when_nobody_holds_them():
    num_threads = threading.active_count()
    before = len(os.listdir("/proc/self/task"))
    for _ in range(5):
        io = open_io.open_io("uring")[0]
        io.open(os.open("/dev/zero", os.O_RDWR))
        del io
    gc.collect()
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= before)  # the kernel shows a thread a moment longer
    wait_until(lambda: threading.active_count() <= num_threads)


@needs_uring
def test_large_aligned_chunks_go_around_the_page_cache(tmp_path):
    with closing(StateDir(tmp_path)) as state_dir, closing(FileStore(state_dir, 1 << 26, io="uring")) as store:
        record = make_record("a", chunk_bytes=131_072)
        assert store.put(record, [aligned_copy(bytes(131_072)) for _ in record.layout.chunks])
        stats = store.io.device.stats()
        if not os.path.exists("/proc/self/fd") or stats["direct"] == 0:
            pytest.skip("this file system has no direct I/O")
        assert stats["direct"] == stats["attempts"] == 2 * record.layout.num_chunks


@needs_uring
def test_a_fault_that_raises_is_an_io_error(tmp_path, monkeypatch):
    with closing(StateDir(tmp_path)) as path, closing(FileStore(path, 10 * SPAN_DISK_BYTES, io="uring")) as store:
        put(store, make_record("a"))
        inject(monkeypatch, store, lambda *_: 1 / 0)
        assert not holds(store, make_record("a"))
        monkeypatch.undo()


def test_without_the_engine_threads_take_over_and_say_why(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(open_io, "why_no_uring", lambda: "the kernel is from a museum")
    open_io._tell_once.cache_clear()
    caplog.set_level(logging.INFO)
    with closing(StateDir(tmp_path)) as state_dir:
        for _ in range(2):
            with closing(FileStore(state_dir, 1 << 20)) as store:
                assert (store.io.name, store.io_reason) == ("threads", "the kernel is from a museum")
    assert [record.message for record in caplog.records if "museum" in record.message] == [
        "segment files are read and written by threads: the kernel is from a museum"
    ]
    with pytest.raises(ConfigError, match="museum"):
        open_io.open_io("uring")
    with pytest.raises(ConfigError, match="io must be one of auto, uring, threads, cufile, got 'spdk'"):
        open_io.open_io("spdk")
    assert open_io.choose_io("threads") == ("threads", "asked for")


@pytest.mark.parametrize("wanted", ["auto", "uring"])
def test_a_ring_that_cannot_be_opened_after_all(monkeypatch, wanted):
    def refused(depth):
        raise OSError(errno.ENOMEM, "no memory to lock")

    monkeypatch.setattr(open_io, "why_no_uring", lambda: None)
    monkeypatch.setattr("mii_hcache.storage.uring.new_device", refused)
    if wanted == "uring":
        with pytest.raises(ConfigError, match="no memory to lock"):
            open_io.open_io(wanted)
    else:
        io, reason = open_io.open_io(wanted)
        assert io.name == "threads" and "no memory to lock" in reason


def test_a_package_without_the_extension_works(tmp_path):
    """As after an installation without a compiler."""
    code = (
        "import sys; sys.modules['mii_hcache._io'] = None\n"
        "from mii_hcache.storage.file import FileStore\n"
        "from mii_hcache.storage.state_dir import StateDir\n"
        "from tests.storage.storage_kit import holds, make_record, put\n"
        "store = FileStore(StateDir(sys.argv[1]), 1 << 20)\n"
        "assert put(store, make_record('a')) and holds(store, make_record('a'))\n"
        "print(store.io.name, store.io_reason)\n"
        "store.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("threads the native engine")


@pytest.mark.parametrize("io_name", BACKENDS)
def test_reads_into_lent_memory(tmp_path, io_name):
    record = make_record("a", chunk_bytes=131_072)
    with closing(StateDir(tmp_path)) as state_dir, closing(FileStore(state_dir, 1 << 26, io=io_name)) as store:
        assert put(store, record)
        for _ in range(100):  # more often than there is room for: what is taken back leaves its place to others
            window = aligned_copy(bytes(record.num_bytes))
            store.lend(window)
            reads = [
                ChunkRead(span_id=record.span_id, layer_idx=chunk.layer_idx, out=chunk.cut(window))
                for chunk in record.layout.chunks
            ]
            assert store.get_into(reads).num_ok == len(reads)
            assert [read.out for read in reads] == make_chunks(record)
            store.take_back(window)
        store.take_back(window)
        last = [aligned_copy(bytes(4096)) for _ in range(100)]
        for buffer in last:  # and what is one too many costs what it did before
            store.lend(buffer)
        assert holds(store, record)
    store.take_back(window)


@needs_uring
def test_a_lack_of_direct_io_is_told_once(caplog):
    caplog.set_level(logging.INFO)
    with closing(open_io.open_io("uring")[0]) as io:
        for _ in range(2):
            io.open(os.open("/dev/full", os.O_RDWR)).close()
    assert [record.message for record in caplog.records] == [
        "this file system has no direct I/O: reads and writes go through the page cache"
    ]
