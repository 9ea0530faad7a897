"""Our prototypes of the CUDA driver against NVIDIA's headers, where there are any: Triton brings one, nvcc another."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("driver_prototypes.cpp")
COMPILE = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wno-invalid-offsetof"]


def headers() -> dict[str, Path]:
    """By version of CUDA: folders with a cuda.h that knows batches of copies (12.8 and later)."""
    folders = [Path("/usr/local/cuda/include"), *Path("/usr/local").glob("cuda-*/include")]
    for name, below in (("triton", "backends/nvidia/include"), ("nvidia", "*/include")):
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or []) if spec else []:
            folders += Path(place).glob(below)
    found = {}
    for folder in folders:
        header = folder / "cuda.h"
        if header.is_file():
            version = int(re.search(r"#define CUDA_VERSION (\d+)", header.read_text(errors="replace")).group(1))
            if version >= 12080:
                found[f"{version // 1000}.{version % 1000 // 10}"] = folder
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.skipif(not headers(), reason="there is no cuda.h of CUDA 12.8 or later (Triton brings one)")
def test_they_are_those_of_the_headers_that_are_here():
    for version, folder in headers().items():
        done = subprocess.run([*COMPILE, f"-I{folder}", str(SOURCE)], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, f"CUDA {version}: {done.stderr}"
        print(f"as in cuda.h of CUDA {version}")
