"""The GPU's kernels compile for every GPU that a build would choose. Running them takes a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.parametrize("gpu", ["80", "89", "90", "100"])
def test_the_checksum_compiles(gpu, tmp_path):
    if NVCC is None:
        pytest.skip("there is no nvcc here")
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if f"compute_{gpu}" not in known:
        pytest.skip(f"nvcc here knows no sm_{gpu}")
    binary = tmp_path / "kernels.cubin"
    source = ROOT / "csrc" / "gpu" / "crc32c.cu"
    command = [NVCC, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{gpu}", "-Werror=all-warnings", "-Xptxas=-v"]
    done = subprocess.run([*command, "-o", str(binary), str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"hcache_crc32c" in binary.read_bytes()
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stdout + done.stderr
