"""Pinned memory is registered before it is used and unregistered before it is unmapped, each slab once; what cannot be
pinned is plain memory, and said."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mii_hcache.runtime import buffers, pinned
from mii_hcache.runtime.buffers import SpanBuffers, as_bytes, host_empty
from mii_hcache.runtime.pinned import PinnedMemory
from mii_hcache.runtime.registrar import DriverRegistrar, Registrar, cpus_near

SLAB = 4 << 20


class Books(Registrar):
    """Keeps books of what is registered, and looks at the memory itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.registered: dict[int, int] = {}
        self.num_registered = 0
        self.refusal: str | None = None

    def register(self, address: int, num_bytes: int) -> None:
        if self.refusal is not None:
            raise OSError(self.refusal)
        assert address % 4096 == 0 and num_bytes % 4096 == 0
        assert ctypes.string_at(address, num_bytes) == bytes(num_bytes), "not touched"
        assert resident_bytes(address) >= num_bytes, "pages are not there"
        with self._lock:
            assert not any(a < address + num_bytes and address < a + n for a, n in self.registered.items()), "twice"
            self.registered[address] = num_bytes
            self.num_registered += 1

    def unregister(self, address: int) -> None:
        with self._lock:
            num_bytes = self.registered.pop(address)
        ctypes.memset(address, 7, num_bytes)  # a fault if it were unmapped already

    def knows(self, tensor: torch.Tensor) -> bool:
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize
        return any(a <= start and stop <= a + n for a, n in self.registered.items())


def resident_bytes(address: int) -> int:
    """Of the mapping that an address lies in."""
    lines = iter(Path("/proc/self/smaps").read_text(encoding="ascii").splitlines())
    for line in lines:
        first, _, rest = line.partition("-")
        if " " not in first and rest and int(first, 16) <= address < int(rest.split()[0], 16):
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    raise AssertionError("not mapped")


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def memory(books: Books) -> PinnedMemory:
    return PinnedMemory(books, slab_bytes=SLAB)


def test_pieces_share_a_slab_and_overlap_nothing(memory, books):
    pieces = [memory.empty(num_bytes) for num_bytes in (1, 5000, 4096, 1 << 20, 300_000)]
    assert books.num_registered == 1 and memory.pinned_bytes == SLAB
    for stamp, piece in enumerate(pieces):
        assert piece.data_ptr() % 4096 == 0 and piece.dtype is torch.uint8 and books.knows(piece)
        piece.fill_(stamp)
    assert [piece.unique().tolist() for piece in pieces] == [[0], [1], [2], [3], [4]]
    assert memory.empty(0).shape == (0,)


def test_a_large_piece_has_a_slab_of_its_own_and_no_power_of_two(memory, books):
    piece = memory.empty(9 << 20)
    assert books.knows(piece) and memory.pinned_bytes == 10 << 20  # huge pages are 2 MiB


def test_memory_goes_back_with_its_last_view(memory, books):
    piece = memory.empty(1 << 20)
    row = piece.view(torch.float16).view(64, -1)[3]
    view = as_bytes(row)
    del piece, row
    gc.collect()
    view[:] = bytes(range(256)) * (len(view) // 256)
    assert memory.pinned_bytes == SLAB and bytes(view[:256]) == bytes(range(256))
    del view
    gc.collect()
    assert memory.pinned_bytes == memory.plain_bytes == 0 and not books.registered


def test_room_between_pieces_is_used_again(memory, books):
    pieces = [memory.empty(1 << 20) for _ in range(4)]
    del pieces[1:3]
    gc.collect()
    again = memory.empty(2 << 20)
    assert books.num_registered == 1 and books.knows(again)
    other = memory.empty(4096)
    assert books.num_registered == 2 and len(books.registered) == 2
    del other
    gc.collect()
    assert len(books.registered) == 1


def test_threads_that_take_and_drop_lose_nothing(memory, books):
    def work(seed: int) -> None:
        chooser, mine = random.Random(seed), []
        for turn in range(80):
            piece = memory.empty(chooser.choice((100, 5000, 1 << 20)))
            piece.fill_(seed)
            mine.append(piece)
            if chooser.random() < 0.6:
                dropped = mine.pop(chooser.randrange(len(mine)))
                if bool((dropped != seed).any()):
                    wrong.append((seed, turn))

    wrong: list[tuple[int, int]] = []
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(1, 5)))  # raises what they raise
    assert not wrong
    gc.collect()
    memory._settle()
    assert not books.registered and memory.pinned_bytes == 0


def test_a_piece_dropped_while_the_lock_is_held_is_taken_back_later(memory, books):
    """As when the collector runs within `empty`."""
    piece = memory.empty(100)
    with memory._lock:
        del piece
        gc.collect()
    other = memory.empty(100)
    del other
    gc.collect()
    assert not books.registered


def test_what_cannot_be_pinned_is_plain_and_said_once(memory, books, caplog):
    books.refusal = "CUDA_ERROR_OUT_OF_MEMORY (2)"
    with caplog.at_level(logging.WARNING):
        pieces = [memory.empty(3 << 20) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "4 MiB of host memory could not be pinned (CUDA_ERROR_OUT_OF_MEMORY (2)): copies from and to the GPU are slow "
        "and hold up the engine. To mend it, raise the limit on locked memory (`ulimit -l unlimited`; for a container "
        "--ulimit memlock=-1 and a memory limit with room for it), or take a smaller --dram-capacity"
    ]
    assert memory.why_not_pinned == "CUDA_ERROR_OUT_OF_MEMORY (2)"
    assert (memory.pinned_bytes, memory.plain_bytes) == (0, 2 * SLAB)
    pieces[0].fill_(3)
    books.refusal = None
    assert books.knows(memory.empty(2 << 20)), "later memory is tried again"
    del pieces
    gc.collect()
    assert memory.plain_bytes == 0


def test_memory_that_a_device_may_still_know_is_not_unmapped(memory, books, monkeypatch):
    monkeypatch.setattr(pinned, "_LOST", [])
    piece = memory.empty(100)
    address = piece.data_ptr()

    def refuse(address: int) -> None:
        raise OSError("the device is lost")

    monkeypatch.setattr(books, "unregister", refuse)
    del piece
    gc.collect()
    assert resident_bytes(address) > 0 and len(pinned._LOST) == 1


def test_a_fork_does_not_see_it(memory, books):
    piece = memory.empty(1 << 20)
    child = os.fork()
    if child == 0:
        del piece  # must not unregister what is the parent's
        os._exit(len(books.registered) != 1)
    assert os.waitpid(child, 0)[1] == 0
    flags = _flags_of(piece.data_ptr())
    assert "dc" in flags, "a fork would copy pages that the GPU does not know"


def _flags_of(address: int) -> list[str]:
    lines = iter(Path("/proc/self/smaps").read_text(encoding="ascii").splitlines())
    for line in lines:
        first, _, rest = line.partition("-")
        if " " not in first and rest and int(first, 16) <= address < int(rest.split()[0], 16):
            return next(line.split()[1:] for line in lines if line.startswith("VmFlags:"))
    raise AssertionError("not mapped")


def test_pages_are_touched_on_the_cpus_that_are_near(memory, books, monkeypatch):
    mine = os.sched_getaffinity(0)
    books.near_cpus = frozenset([min(mine)])
    seen = []
    monkeypatch.setattr(pinned.ctypes, "memset", lambda *args: seen.append(os.sched_getaffinity(0)))
    slab = pinned._Slab(64 << 20)
    monkeypatch.setattr(pinned, "num_usable_cpus", lambda: 8)
    slab.touch(books.near_cpus)
    assert seen == [set(books.near_cpus)] * 4
    assert os.sched_getaffinity(0) == mine


def test_host_memory_is_pinned_where_there_is_a_device(memory, books, monkeypatch):
    monkeypatch.setattr(buffers, "pinned_memory", lambda: memory)
    rows = host_empty(3, 64, 100, dtype=torch.bfloat16)
    assert rows.shape == (3, 64, 100) and rows.dtype is torch.bfloat16 and books.knows(rows)
    assert host_empty(0, 5, dtype=torch.float32).shape == (0, 5)


def test_buffers_that_nobody_needed_for_a_while_go_back(memory, books, monkeypatch):
    monkeypatch.setattr(buffers, "pinned_memory", lambda: memory)
    clock = [0.0]
    monkeypatch.setattr(buffers, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    made, gone = [], []
    pool = SpanBuffers(
        shape=(3 << 20,),
        dtype=torch.uint8,
        max_buffers=8,
        on_made=lambda buffer: made.append(buffer.data_ptr()),
        on_gone=lambda buffer: gone.append(buffer.data_ptr()),
        idle_s=10.0,
    )
    taken = [pool.acquire() for _ in range(5)]
    assert len(books.registered) == 5
    for buffer in taken:
        pool.release(buffer)
    del taken, buffer
    for clock[0] in (6.0, 12.0):  # two at a time are enough from now on
        pair = [pool.acquire(), pool.acquire()]
        for buffer in pair:
            pool.release(buffer)
        del pair, buffer
    gc.collect()
    assert gone == made[:3] and len(books.registered) == 2 and pool.num_in_use == 0
    again = [pool.acquire() for _ in range(8)]
    assert None not in again and pool.acquire() is None, "the bound is what it was"


# --- the driver ------------------------------------------------------------------------------------------------------


class Driver:
    """libcuda's calls, noted."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.depth = 0
        self.error = 0

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = 40 + ordinal.value
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 1000 + device.value
        return 0

    def cuDeviceGetPCIBusId(self, text, length, device):
        text.value = b"0000:AB:00.0"
        return 0

    def cuCtxPushCurrent_v2(self, context):
        assert context.value == 1042
        self.depth += 1
        return 0

    def cuCtxPopCurrent_v2(self, context):
        self.depth -= 1
        return 0

    def cuMemHostRegister_v2(self, address, num_bytes, flags):
        assert self.depth == 1
        self.calls.append(("register", address.value, num_bytes.value, flags.value))
        return self.error

    def cuMemHostUnregister(self, address):
        assert self.depth == 1
        self.calls.append(("unregister", address.value))
        return self.error

    def cuGetErrorName(self, error, text):
        text._obj.value = b"CUDA_ERROR_TEST"
        return 0


def test_the_driver_registers_in_the_devices_context():
    driver = Driver()
    registrar = DriverRegistrar(2, driver)
    registrar.register(1 << 40, 4096)
    registrar.unregister(1 << 40)
    assert driver.calls == [("register", 1 << 40, 4096, 1), ("unregister", 1 << 40)]
    driver.error = 801
    with pytest.raises(OSError, match=r"cuMemHostRegister_v2: CUDA_ERROR_TEST \(801\)"):
        registrar.register(1 << 40, 4096)
    assert driver.depth == 0


def test_no_driver_is_an_os_error():
    with pytest.raises(OSError, match=r"libcuda|cuDeviceGet"):  # other tests of this process may have loaded a fake one
        DriverRegistrar(0)


def test_names_and_arguments_are_the_drivers():
    """As its header declares them, where there is one."""
    header = Path("/usr/local/cuda/include/cuda.h")
    if not header.exists():
        pytest.skip(f"{header} is not there: nothing to compare the driver's names with")
    text = header.read_text(encoding="utf-8", errors="replace")
    for name in ("cuMemHostRegister", "cuCtxPushCurrent", "cuCtxPopCurrent"):
        assert f"#define {name} " in text and f"{name}_v2" in text
    for declared in (
        "cuMemHostRegister(void *p, size_t bytesize, unsigned int Flags)",
        "cuMemHostUnregister(void *p)",
        "cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev)",
        "cuDeviceGetPCIBusId(char *pciBusId, int len, CUdevice dev)",
        "cuGetErrorName(CUresult error, const char **pStr)",
    ):
        assert declared in text


@pytest.mark.parametrize(
    ("numa_node", "num_nodes", "cpulist", "expected"),
    [("1", 2, "{mine}", True), ("-1", 2, "{mine}", False), ("0", 1, "{mine}", False), ("1", 2, "100000-100003", False)],
)
def test_cpus_near_a_device(tmp_path, numa_node, num_nodes, cpulist, expected):
    mine = os.sched_getaffinity(0)
    device = tmp_path / "bus" / "pci" / "devices" / "0000:ab:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{numa_node}\n")
    for node in range(num_nodes):
        folder = tmp_path / "devices" / "system" / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpulist.format(mine=f"{min(mine)}-{max(mine)},100000\n"))
    assert cpus_near("0000:AB:00.0", tmp_path) == (frozenset(mine) if expected else frozenset())
    assert cpus_near("0000:FF:00.0", tmp_path) == frozenset()
