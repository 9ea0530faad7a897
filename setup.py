"""Metadata is in pyproject.toml. Here is what it cannot say: the native I/O engine, built where there is a compiler.

Without one the package installs and works all the same, with `--io threads`; `python -m mii_hcache doctor` says so.
SPDK is linked where pkg-config finds it (PKG_CONFIG_PATH says where); MII_HCACHE_SPDK=0 leaves it out.
Where nvcc is, the GPU's kernels are compiled, too, to a file that the CUDA driver loads: nothing is linked to CUDA."""

import os
import shlex
import subprocess
import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

LINK_FLAGS = ["-pthread", "-ldl"]


def pkg_config(*arguments):
    done = subprocess.run(["pkg-config", *arguments], capture_output=True, text=True, check=True)
    return shlex.split(done.stdout)


def spdk_flags():
    """Flags to compile and to link with SPDK, empty where it is not to be had."""
    names = ["spdk_nvme", "spdk_env_dpdk"]
    try:
        if os.environ.get("MII_HCACHE_SPDK") == "0":
            raise OSError("MII_HCACHE_SPDK=0")
        compile_flags = pkg_config("--cflags", *names)
        libraries = pkg_config("--libs", *names)
        folders = [flag[2:] for flag in pkg_config("--libs-only-L", *names)]  # none for the system's own
        system = pkg_config("--libs", "--static", "spdk_syslibs")
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or error
        print(f"mii_hcache: building without SPDK ({' '.join(str(why).split())})")
        return [], []
    # SPDK's parts make themselves known by constructors, which nobody refers to: the linker must not drop them
    is_static = folders and not any(os.path.exists(os.path.join(folder, "libspdk_nvme.so")) for folder in folders)
    if is_static:
        keep, release = ["-Wl,--whole-archive"], ["-Wl,--no-whole-archive"]
    else:
        keep, release = ["-Wl,--no-as-needed"], ["-Wl,--as-needed", *(f"-Wl,-rpath,{folder}" for folder in folders)]
    kind, version = "static" if is_static else "shared", pkg_config("--modversion", names[0])[0]
    print(f"mii_hcache: building with SPDK's {kind} libraries, spdk_nvme {version}")
    return ["-DHCACHE_WITH_SPDK", *compile_flags], [*keep, *libraries, *release, *system]


class BuildNative(build_ext):
    """The extension, then the kernels."""

    def run(self):
        super().run()
        in_place = self.inplace or self.editable_mode
        self.build_kernels("mii_hcache" if in_place else os.path.join(self.build_lib, "mii_hcache"))

    def build_extension(self, extension):
        """A SPDK that does not compile or link costs the `spdk` backend and nothing else."""
        try:
            super().build_extension(extension)
        except (CompileError, LinkError) as error:
            if not spdk_compile:
                raise
            print(f"mii_hcache: SPDK cannot be built in ({error}); building without it")
            for flag in spdk_compile:
                extension.extra_compile_args.remove(flag)
            extension.extra_link_args[:] = LINK_FLAGS
            self.force = True
            super().build_extension(extension)

    def build_kernels(self, folder):
        """They are for GPUs: where they cannot be built, the rest is."""
        subprocess.run([sys.executable, "csrc/build_kernels.py", os.path.join(folder, "_gpu.fatbin")])


parts = ["csrc/io", "csrc/gpu", "csrc/cufile", "csrc/spdk", "csrc/python"]
sources = ["csrc/bindings.cpp", *(path for part in parts for path in sorted(glob(f"{part}/*.cpp")))]
headers = sorted(glob("csrc/*/*.hpp") + glob("csrc/*/*.cu*"))
spdk_compile, spdk_link = spdk_flags()
setup(
    ext_modules=[
        Pybind11Extension(
            "mii_hcache._io",
            sources,
            depends=headers,
            cxx_std=20,
            extra_compile_args=["-O2", "-Wall", "-Wextra", "-pthread", *spdk_compile],
            extra_link_args=[*LINK_FLAGS, *spdk_link],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
