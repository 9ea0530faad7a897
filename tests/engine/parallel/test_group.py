"""Ranks in processes of their own: sums and gathers are right, and a rank that is gone is an error, not a wait."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mii_hcache.engine.parallel.group import TIMEOUT_S, RankGroup
from mii_hcache.errors import RankLostError
from tests.engine.parallel.forked import context

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def _collect(directory: str, rank: int, size: int, answers: Any) -> None:
    torch.set_num_threads(1)
    group = RankGroup.join(Path(directory), rank, size, CPU)
    told: list[Any] = []
    for dtype in DTYPES[:3]:
        torch.manual_seed(rank)
        summed = group.all_reduce(torch.randn(257, dtype=torch.float32).to(dtype))
        told.append(summed.view(torch.uint8).numpy().tobytes())
    for dtype in DTYPES:
        out = torch.empty(size * 3, 5, dtype=dtype)
        group.all_gather_rows(out, torch.full((3, 5), rank + 1).to(dtype))
        told.append(out.float().tolist())
    told.append(group.least(10 - rank))
    group.close()
    group.close()
    for call in (group.all_reduce, lambda rows: group.beside.all_gather_rows(rows, rows)):
        try:
            call(torch.ones(1))
            told.append("done alone?")
        except RankLostError as error:
            told.append(str(error))
    answers.put((rank, told))


def _start(target: Any, directory: Path, size: int, *arguments: Any) -> list[Any]:
    processes = [context.Process(target=target, args=(str(directory), rank, size, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_sum_and_gather(tmp_path, size):
    answers = context.Queue()
    processes = _start(_collect, tmp_path, size, answers)
    told = dict(answers.get(timeout=200) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    parts = []
    for rank in range(size):
        torch.manual_seed(rank)
        parts.append(torch.randn(257, dtype=torch.float32))
    summed = torch.frombuffer(bytearray(told[0][0]), dtype=torch.float32)
    assert torch.allclose(summed, torch.stack(parts).sum(0), atol=1e-5)
    rows = [[float(rank + 1)] * 5 for rank in range(size) for _ in range(3)]
    for rank in range(size):
        assert told[rank][:3] == told[0][:3], "the same bits on every rank"
        assert told[rank][3:7] == [rows] * 4
        assert told[rank][7] == 10 - (size - 1)
        assert told[rank][8:] == [f"rank {rank} of {size} has left the others"] * 2


def _lose(directory: str, rank: int, size: int, answers: Any) -> None:
    group = RankGroup.join(Path(directory), rank, size, CPU)
    group.all_reduce(torch.ones(1))
    if rank == 1:
        os._exit(9)
    started_s = time.monotonic()
    try:
        group.all_reduce(torch.ones(4096))
    except RankLostError as error:
        answers.put((str(error), time.monotonic() - started_s))


def test_a_rank_that_is_gone_is_an_error(tmp_path):
    answers = context.Queue()
    _start(_lose, tmp_path, 2, answers)
    message, seconds = answers.get(timeout=200)
    assert "rank 0 of 2: all_reduce failed" in message
    assert seconds < 0.75 * TIMEOUT_S, "it waited for who is gone"


def test_nobody_waits_for_a_rank_that_is_known_to_be_gone(tmp_path):
    """Nor longer than it is told to: nothing goes on in native code, which an interpreter could not end."""
    looked = []

    def check() -> None:
        looked.append(time.monotonic())
        if len(looked) == 3:
            raise RankLostError("rank 1 of 2 was killed")

    with pytest.raises(RankLostError, match="was killed"):
        RankGroup.join(tmp_path, 0, 2, CPU, check=check)
    with pytest.raises(RankLostError, match=r"did not meet the others within 0.1 s"):
        RankGroup.join(tmp_path, 0, 2, CPU, timeout_s=0.1)


def test_a_group_of_one_needs_nobody(tmp_path):
    group = RankGroup.join(tmp_path, 0, 1, CPU)
    out = torch.empty(2, 3)
    group.all_gather_rows(out, torch.ones(2, 3))
    assert torch.equal(group.all_reduce(out), torch.ones(2, 3))
    assert group.least(4) == 4 and not list(tmp_path.iterdir())
