"""What streams launch goes where it should; of CUDA's only what needs no GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from mii_hcache.runtime.streams import CudaStream, CudaStreams, HostStreams, streams_of


def test_a_cpu_does_everything_at_once():
    streams = streams_of(torch.device("cpu"))
    assert isinstance(streams, HostStreams) and not streams.has_own_memory
    target, source = torch.zeros(2, 4), torch.arange(8.0).view(2, 4)
    before = streams.main.record(is_timed=True)
    streams.main.copy_many([(target[0], source[1]), (target[1], source[0])])
    after = streams.main.record(is_timed=True)
    assert target.tolist() == source.flip(0).tolist()
    assert before.is_done and after.is_done and before.passed_s <= after.passed_s


class _Batches:
    """Takes the pairs that are contiguous, and tells on which stream."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def copy(self, pairs, stream):
        pairs = list(pairs)
        ours = [pair for pair in pairs if pair[0].is_contiguous()]
        for target, source in ours:
            target.copy_(source)
        self.calls.append((len(ours), stream))
        return [pair for pair in pairs if not pair[0].is_contiguous()]


@pytest.mark.parametrize("is_native", [True, False])
def test_many_copies_go_in_one_call_and_the_rest_by_torch(monkeypatch, is_native):
    batches = _Batches() if is_native else None
    monkeypatch.setattr("mii_hcache.runtime.streams.open_gpu_copies", lambda device: batches)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: contextlib.nullcontext())
    streams = CudaStreams(torch.device("cuda", 0))
    stream = CudaStream(streams, SimpleNamespace(cuda_stream=77))  # type: ignore[arg-type]
    target, source = torch.zeros(4, 6), torch.arange(24.0).view(4, 6)
    pairs = [(target[0], source[3]), (target[1:3], source[0:2]), (target[3, ::2], source[2, :3])]
    stream.copy_many(pairs)
    assert all(torch.equal(one, other) for one, other in pairs)
    if batches is not None:
        assert batches.calls == [(2, 77)]


@pytest.mark.parametrize("native", ["takes it", "leaves it", None])
def test_joined_pieces_go_in_one_call_or_one_by_one(monkeypatch, native):
    class Joining(_Batches):
        def copy_joined(self, target, pieces, stream):
            if native == "leaves it":
                return False
            target.copy_(torch.cat(list(pieces)))
            self.calls.append((len(pieces), stream))
            return True

    joining = None if native is None else Joining()
    monkeypatch.setattr("mii_hcache.runtime.streams.open_gpu_copies", lambda device: joining)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: contextlib.nullcontext())
    stream = CudaStream(CudaStreams(torch.device("cuda", 0)), SimpleNamespace(cuda_stream=77))  # type: ignore[arg-type]
    target, pieces = torch.zeros(4, 6), list(torch.arange(24.0).view(2, 2, 6).unbind())
    stream.copy_joined(target, pieces)
    assert torch.equal(target, torch.cat(pieces))
    if joining is not None:
        assert joining.calls == [(2, 77)]
