"""Many copies to a GPU by one call, on a fake of the CUDA driver."""

from __future__ import annotations

import mmap
from contextlib import closing

import pytest
import torch

from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.gpu_copy import GpuCopies, open_gpu_copies
from mii_hcache.runtime.lent_rows import LentRows
from mii_hcache.storage import native

GPU = torch.device("cuda", 0)


class OnGpu:
    """As much of a tensor on the fake GPU as a copy asks for."""

    def __init__(self, address: int, like: torch.Tensor, *, is_contiguous: bool = True) -> None:
        self.device, self.shape, self.dtype, self.nbytes = GPU, like.shape, like.dtype, like.nbytes
        self._address, self._is_contiguous = address, is_contiguous

    def data_ptr(self) -> int:
        return self._address

    def is_contiguous(self) -> bool:
        return self._is_contiguous


@pytest.fixture
def copies(fakes):
    with closing(GpuCopies(GPU)) as copies:
        yield copies


def scattered(gpu, count: int, elements: int = 96):
    """Rows on the host, and where each goes: another order, with gaps."""
    host = torch.randn(count, elements)
    room = gpu.allocate(count * 2 * elements * 4)
    places = [room + (count - 1 - row) * 2 * elements * 4 for row in range(count)]
    return host, [(OnGpu(place, host[row]), host[row]) for row, place in enumerate(places)], places


@pytest.mark.parametrize(
    ("driver", "how", "calls"),
    [(13000, "in batches (CUDA 13)", 2), (12080, "in batches (CUDA 12.8)", 2), (12040, "one by one", 300)],
)
def test_rows_arrive_whatever_the_driver(fakes, gpu, driver, how, calls):
    fakes.cuda["driver_version"] = driver
    with closing(GpuCopies(GPU)) as copies:
        assert how in copies.how
        host, pairs, places = scattered(gpu, 300)
        before = fakes.cuda["batches"] + fakes.cuda["copies"]
        assert copies.copy(pairs, gpu.stream) == []
        assert fakes.cuda["batches"] + fakes.cuda["copies"] - before == calls
        for row, place in zip(host, places, strict=True):
            assert gpu.bytes_at(place, row.nbytes) == row.numpy().tobytes()


@pytest.mark.parametrize("is_lent", [False, True])
def test_pieces_are_joined_where_they_go(fakes, gpu, copies, is_lent):
    pieces = [torch.randn(4, 24) for _ in range(40)]
    if is_lent:
        addresses = [piece.data_ptr() for piece in pieces]
        given = LentRows([as_bytes(piece) for piece in pieces], addresses, torch.float32, (4, 24))
    else:
        given = pieces
    whole = torch.cat(pieces)
    target = OnGpu(gpu.allocate(whole.nbytes), whole)
    assert copies.copy_joined(target, given, gpu.stream)
    assert gpu.bytes_at(target.data_ptr(), whole.nbytes) == whole.numpy().tobytes()
    with pytest.raises(ValueError, match="384 bytes are left"):
        copies.copy_joined(target, given[1:], gpu.stream)
    with pytest.raises(ValueError, match="-384 bytes are left"):
        copies.copy_joined(OnGpu(target.data_ptr(), whole[4:]), given, gpu.stream)


def test_pieces_that_it_cannot_join_are_left_to_torch(fakes, gpu, copies):
    pieces = [torch.randn(4, 24) for _ in range(3)]
    whole = torch.cat(pieces)
    room = gpu.allocate(whole.nbytes)
    assert not copies.copy_joined(whole, pieces, gpu.stream)
    assert not copies.copy_joined(OnGpu(room, whole, is_contiguous=False), pieces, gpu.stream)
    assert not copies.copy_joined(OnGpu(room, whole), [*pieces[:2], pieces[2].double()], gpu.stream)
    assert not copies.copy_joined(OnGpu(room, whole), [*pieces[:2], torch.randn(24, 4).t()], gpu.stream)
    assert gpu.bytes_at(room, 4) == b"\xa5" * 4


def test_pinned_memory_is_read_when_the_stream_has_come_to_it(fakes, gpu, copies):
    with closing(mmap.mmap(-1, 1 << 16)) as memory, memoryview(memory) as view:
        copies.pin(view)
        assert fakes.cuda["pinned"] == 1
        fakes.cuda["delayed"] = 1
        host = torch.frombuffer(view, dtype=torch.float32).view(2, -1)
        room = gpu.allocate(host.nbytes)
        host.fill_(1)
        copies.copy([(OnGpu(room + host[0].nbytes, host[0]), host[0]), (OnGpu(room, host[1]), host[1])], gpu.stream)
        host[1].fill_(2)
        assert gpu.bytes_at(room, 4) == b"\xa5" * 4
        assert gpu.run() == 1
        assert gpu.bytes_at(room, host.nbytes) == host.flip(0).contiguous().numpy().tobytes()
        copies.unpin(view)
        assert fakes.cuda["pinned"] == 0
        del host


def test_what_is_not_for_it_is_left_to_torch(fakes, gpu, copies):
    host, pairs, places = scattered(gpu, 3)
    on_host = (torch.empty(96), host[0])
    strided = (OnGpu(places[1], host[1], is_contiguous=False), host[1])
    from_strided = (OnGpu(places[2], host[:, 0]), host[:, 0])
    back = (host[2], OnGpu(places[2], host[2]))
    left = copies.copy([pairs[0], on_host, strided, from_strided, back], gpu.stream)
    assert [id(target) for target, _ in left] == [id(pair[0]) for pair in (on_host, strided, from_strided, back)]
    assert gpu.bytes_at(places[0], host[0].nbytes) == host[0].numpy().tobytes()
    assert gpu.bytes_at(places[1], 4) == b"\xa5" * 4


def test_what_does_not_fit_is_refused(fakes, gpu, copies):
    host, pairs, places = scattered(gpu, 3)
    with pytest.raises(ValueError, match=r"\(96,\) of torch.float32 are no \(95,\)"):
        copies.copy([*pairs, (OnGpu(places[0], host[0, 1:]), host[0])], gpu.stream)
    assert gpu.bytes_at(places[1], 4) == b"\xa5" * 4
    fakes.cuda["batch_error"] = 700
    with pytest.raises(OSError, match="copying to the GPU failed"):
        copies.copy(pairs, gpu.stream)
    fakes.cuda["register_error"] = 1
    with closing(mmap.mmap(-1, 4096)) as memory, pytest.raises(OSError, match="cuMemHostRegister failed"):
        copies.pin(memoryview(memory))


def test_where_there_is_no_gpu_it_is_told(loaded, caplog):
    caplog.set_level("INFO")
    assert open_gpu_copies(torch.device("cpu")) is None
    assert native.why_no_gpu() == "there is no GPU"
    assert not caplog.records and open_gpu_copies(GPU) is None
    assert "copies to cuda:0 go through torch, one by one: there is no GPU" in caplog.text
    loaded.cuda["init_error"] = 0


def test_where_there_is_one_it_is_taken(fakes, caplog):
    caplog.set_level("INFO")
    with closing(open_gpu_copies(GPU)):
        assert "copies to cuda:0 go in batches (CUDA 13)" in caplog.text
    with pytest.raises(OSError, match="cuDeviceGet failed"):
        GpuCopies(torch.device("cuda", 1))
    with pytest.raises(ValueError, match="which GPU is cuda"):
        GpuCopies(torch.device("cuda"))
    assert fakes.cuda["contexts"] == 0
