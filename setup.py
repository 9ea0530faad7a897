"""Metadata is in pyproject.toml. Here is what it cannot say: the native I/O engine, built where there is a compiler.

Without one the package installs and works all the same, with `--io threads`; `python -m mii_hcache doctor` says so."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

sources = ["csrc/bindings.cpp", *sorted(glob("csrc/io/*.cpp")), *sorted(glob("csrc/python/*.cpp"))]
headers = sorted(glob("csrc/*/*.hpp"))
flags = ["-O2", "-Wall", "-Wextra", "-pthread"]
setup(
    ext_modules=[
        Pybind11Extension(
            "mii_hcache._io",
            sources,
            depends=headers,
            cxx_std=20,
            extra_compile_args=flags,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
