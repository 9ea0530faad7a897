"""Our Triton kernels become machine code for every kind of GPU that is served, and fit it. Running them takes one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install 'mii-hcache[test]')")

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(900)  # a minute, unless all was compiled before; more on a machine that is busy


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """In a process of its own: in this one Triton interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_for_every_gpu_and_both_dtypes(compiled):
    attention = {(row["sm"], row["kernel"].split()[1]) for row in compiled if row["kernel"].startswith("attention")}
    assert attention == {(sm, tile) for sm in (80, 89, 90, 100) for tile in ("narrow", "wide")}
    assert {row["dtype"] for row in compiled} == {"fp16", "bf16"}


def test_shared_memory_is_there(compiled):
    too_much = [row for row in compiled if row["shared_bytes"] > row["shared_limit_bytes"]]
    assert not too_much


def test_nothing_spills_out_of_the_registers(compiled):
    assert not [row for row in compiled if row["stack_bytes"] or row["local_bytes"]]


def test_attention_copies_whole_vectors_and_multiplies_on_tensor_cores(compiled):
    """What decides its speed, as far as machine code tells: addresses that the compiler cannot see to be aligned and
    neighbours are copied in pieces of 4 bytes."""
    for row in compiled:
        if row["kernel"].startswith("attention"):
            assert row["async_copy_bytes"] == [16], row
            newest = {90: "wgmma", 100: "tcgen05.mma"}.get(row["sm"] if "wide" in row["kernel"] else 0, "mma.sync")
            assert newest in row["products"], row
