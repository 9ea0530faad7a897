"""The GPU's kernels compile for every GPU that a build would choose, and none spills. Running them takes a GPU.

Registers, shared memory and stack of each are printed: `python -m pytest tests/native/test_gpu_kernels.py -s`."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "crc32c.cu": {"hcache_crc32c"},
    "rope_scatter.cu": {
        f"hcache_rope_scatter_{dtype}{suffix}"
        for dtype in ("float16", "bfloat16", "float32")
        for suffix in ("", "_unaligned")
    },
}
SOURCES["kernels.cu"] = set().union(*SOURCES.values())
GPUS = ["80", "89", "90", "100"]
NO_NVCC = "there is no nvcc here (csrc/build_kernels.py says which of pip's packages have one)"
SCRIPT = ROOT / "csrc" / "build_kernels.py"
_spec = importlib.util.spec_from_file_location("build_kernels", SCRIPT)
building = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(building)
MAX_SHARED_BYTES = 48 << 10
"""What every GPU gives a block without being asked."""


def find_cuobjdump() -> str | None:
    """CUDA's own, or Triton's."""
    triton = importlib.util.find_spec("triton")
    folder = Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin" if triton else None
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(folder))


def usage_of(log: str) -> dict[str, tuple[int, int, int, int]]:
    """Of each kernel in ptxas's words: registers, bytes of shared memory, of stack, and spilled."""
    used = {}
    for part in log.split("Compiling entry function '")[1:]:
        stack, *spilled = (int(number) for number in re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups())  # fmt: skip
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        used[part.split("'")[0]] = registers, int(shared.group(1)) if shared else 0, stack, sum(spilled)
    return used


def test_every_source_is_compiled_here():
    assert {path.name for path in (ROOT / "csrc" / "gpu").glob("*.cu")} == set(SOURCES)
    together = (ROOT / "csrc" / "gpu" / "kernels.cu").read_text(encoding="utf-8")
    assert set(re.findall(r'#include "(.+)"', together)) == set(SOURCES) - {"kernels.cu"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("gpu", GPUS)
def test_it_compiles(gpu, source, tmp_path):
    nvcc = building.find_nvcc()
    if nvcc is None:
        pytest.skip(NO_NVCC)
    if gpu not in building.known_gpus(nvcc):
        pytest.skip(f"nvcc here knows no sm_{gpu}")
    binary = tmp_path / "kernels.cubin"
    command = [nvcc, *building.FLAGS, "-cubin", f"-arch=sm_{gpu}", "-Werror=all-warnings", "-Xptxas=-v"]
    command += ["-o", str(binary), str(ROOT / "csrc" / "gpu" / source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    used = usage_of(done.stdout + done.stderr)
    assert set(used) == SOURCES[source]
    for name, (registers, shared_bytes, stack_bytes, spilled_bytes) in sorted(used.items()):
        print(f"sm_{gpu} {name}: {registers} registers, {shared_bytes} bytes shared, {stack_bytes} bytes of stack")
        assert spilled_bytes == 0, name
        assert shared_bytes <= MAX_SHARED_BYTES, name
        assert registers <= 64, f"{name}: fewer than 1,024 threads of a multiprocessor's 65,536 registers"


def test_the_fat_binary_has_every_kernel_for_every_gpu(tmp_path):
    nvcc, cuobjdump = building.find_nvcc(), find_cuobjdump()
    if nvcc is None or building.known_gpus(nvcc) != GPUS:
        pytest.skip(NO_NVCC if nvcc is None else f"nvcc here does not know all of {GPUS}")
    binary = tmp_path / "new" / "kernels.fatbin"
    done = subprocess.run([sys.executable, str(SCRIPT), str(binary)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "mii_hcache: the GPU's kernels are built for sm_80, sm_89, sm_90, sm_100\n"
    assert binary.read_bytes()[:4] == bytes.fromhex("50ed55ba")  # what the tests' fake driver takes for one
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump here to look into it (CUDA and Triton bring one)")
    listed = subprocess.run([cuobjdump, "-elf", str(binary)], capture_output=True, text=True, timeout=100).stdout
    found: dict[str, set[str]] = {}
    for part in listed.split("Fatbin elf code:")[1:]:
        gpu = re.search(r"arch = sm_(\d+)", part).group(1)
        found[gpu] = set(re.findall(r"\.text\.(hcache_\w+)", part))
    assert found == dict.fromkeys(GPUS, SOURCES["kernels.cu"])
    portable = subprocess.run([cuobjdump, "-ptx", str(binary)], capture_output=True, text=True, timeout=100).stdout
    assert set(re.findall(r"\.entry (hcache_\w+)", portable)) == SOURCES["kernels.cu"]
    assert ".target sm_100" in portable


def test_without_nvcc_it_is_told_and_nothing_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "find_nvcc", lambda: None)
    assert building.build(tmp_path / "kernels.fatbin") == "there is no nvcc"
    assert not list(tmp_path.iterdir())


def test_an_nvcc_that_fails_is_told(tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-arch ] && echo compute_90 || exit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(building, "find_nvcc", lambda: str(nvcc))
    assert building.known_gpus(str(nvcc)) == ["90"]
    assert building.build(tmp_path / "kernels.fatbin") == f"{nvcc} failed"
    nvcc.write_text("#!/bin/sh\necho compute_75\n")
    assert building.build(tmp_path / "kernels.fatbin") == f"{nvcc} knows none of our GPUs"
