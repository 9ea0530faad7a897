"""Compiles the GPU's kernels to a file that the CUDA driver loads; the wheel needs no CUDA. `setup.py` runs it:

    python csrc/build_kernels.py mii_hcache/_gpu.fatbin

Takes nvcc of the PATH, of /usr/local/cuda, or of pip's packages in this Python's environment (nvidia-cuda-nvcc,
nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-nvvm, all of one version, 13.0 or later). Needs the standard library
alone, says what it did, and exits with 1 where it built nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "gpu" / "kernels.cu"
GPUS = ["80", "89", "90", "100"]
FLAGS = ["-std=c++17", "-O3"]


def find_nvcc() -> str | None:
    pips = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    folders = ["/usr/local/cuda/bin", *map(str, reversed(pips))]
    return shutil.which("nvcc") or next(filter(None, (shutil.which("nvcc", path=one) for one in folders)), None)


def known_gpus(nvcc: str) -> list[str]:
    """Those of `GPUS` that this nvcc compiles for."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [gpu for gpu in GPUS if f"compute_{gpu}" in listed]


def build(target: Path) -> str | None:
    """Make `target`. Returns None, else why it is not there."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc"
    gpus = known_gpus(nvcc)
    if not gpus:
        return f"{nvcc} knows none of our GPUs"
    code = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in gpus]
    code += [f"-gencode=arch=compute_{gpu},code=compute_{gpu}" for gpu in gpus[-1:]]  # for GPUs yet to come
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([nvcc, *FLAGS, "-fatbin", *code, "-o", str(target), str(SOURCE)])
    if done.returncode != 0:
        return f"{nvcc} failed"
    print(f"mii_hcache: the GPU's kernels are built for {', '.join(f'sm_{gpu}' for gpu in gpus)}")
    return None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    why_not = build(Path(sys.argv[1]))
    if why_not is not None:
        print(f"mii_hcache: the GPU's kernels are not built ({why_not})")
    sys.exit(why_not is not None)
