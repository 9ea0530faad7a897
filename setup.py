"""Metadata is in pyproject.toml. Here is what it cannot say: the native I/O engine, built where there is a compiler.

Without one the package installs and works all the same, with `--io threads`; `python -m mii_hcache doctor` says so.
Where nvcc is, the GPU's kernels are compiled, too, to a file that the CUDA driver loads: nothing is linked to CUDA."""

import os
import shutil
import subprocess
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

GPUS = ["80", "89", "90", "100"]


class BuildNative(build_ext):
    """The extension, then the kernels."""

    def run(self):
        super().run()
        in_place = self.inplace or self.editable_mode
        self.build_kernels("mii_hcache" if in_place else os.path.join(self.build_lib, "mii_hcache"))

    def build_kernels(self, folder):
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            print("mii_hcache: the GPU's kernels are not built (there is no nvcc)")
            return
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        gpus = [gpu for gpu in GPUS if f"compute_{gpu}" in known]
        code = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in gpus]
        code += [f"-gencode=arch=compute_{gpu},code=compute_{gpu}" for gpu in gpus[-1:]]  # for GPUs yet to come
        target = os.path.join(folder, "_gpu.fatbin")
        os.makedirs(folder, exist_ok=True)
        command = [nvcc, "-std=c++17", "-O3", "-fatbin", *code, "-o", target, "csrc/gpu/crc32c.cu"]
        if not gpus or subprocess.run(command).returncode != 0:
            print("mii_hcache: the GPU's kernels are not built (nvcc failed)")


parts = ["csrc/io", "csrc/gpu", "csrc/cufile", "csrc/python"]
sources = ["csrc/bindings.cpp", *(path for part in parts for path in sorted(glob(f"{part}/*.cpp")))]
headers = sorted(glob("csrc/*/*.hpp") + glob("csrc/*/*.cuh"))
flags = ["-O2", "-Wall", "-Wextra", "-pthread"]
setup(
    ext_modules=[
        Pybind11Extension(
            "mii_hcache._io",
            sources,
            depends=headers,
            cxx_std=20,
            extra_compile_args=flags,
            extra_link_args=["-pthread", "-ldl"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
