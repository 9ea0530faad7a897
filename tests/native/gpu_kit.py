"""NVIDIA's libraries as fakes of ours (tests/native/fakes), for machines without a GPU.

The engine loads them once in a process and keeps them, so they are made to say that there is no GPU when no test uses
them.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mii_hcache.storage import native

ROOT = Path(__file__).resolve().parents[2]
_QUIET = {
    "fake_cuda": {"gpus": 0, "init_error": 0, "launch_error": 0, "copy_error": 0, "allocate_error": 0},
    "fake_cufile": {
        **dict.fromkeys(["open_error", "register_error", "buffer_error", "times", "only_direct", "most_bytes"], 0),
        **dict.fromkeys(["delay_us", "hold", "nvfs", "status"], 0),
        "flip_at": -1,
        "control": 2,
    },
}


class Fake:
    """One of the two libraries, and its script."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path = path
        self._prefix = prefix
        self._library = ctypes.CDLL(str(path))
        getattr(self._library, f"{prefix}_get").restype = ctypes.c_long

    def __setitem__(self, name: str, value: int) -> None:
        getattr(self._library, f"{self._prefix}_set")(name.encode(), ctypes.c_long(value))

    def __getitem__(self, name: str) -> int:
        return getattr(self._library, f"{self._prefix}_get")(name.encode())

    def reset(self) -> None:
        for name, value in _QUIET[self._prefix].items():
            self[name] = value


class Fakes:
    def __init__(self, folder: Path) -> None:
        self.cuda = Fake(folder / "libcuda.so.1", "fake_cuda")
        self.cufile = Fake(folder / "libcufile.so.0", "fake_cufile")

    def fail(self, times: int, result: int, errno: int = 0) -> None:
        """The next `times` transfers (-1: all) return `result`."""
        self.cufile["result"], self.cufile["errno"], self.cufile["times"] = result, errno, times

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self.cuda["gpus"] = 1
        try:
            yield
        finally:
            left = {name: self.cuda[name] for name in ("contexts", "allocations", "modules", "streams")}
            left |= {name: self.cufile[name] for name in ("handles", "buffers")}
            self.cuda.reset()
            self.cufile.reset()
        assert not any(left.values()), f"not released: {left}"


def build_fakes() -> Path:
    """The folder of the two libraries. Skips the test where they cannot be built."""
    if native.why_not_built() is not None:
        pytest.skip(str(native.why_not_built()))
    if not (shutil.which("g++") and shutil.which("make")):
        pytest.skip("no g++ or no make: the fakes of NVIDIA's libraries cannot be built")
    build = ROOT / "build" / "csrc-tests" / "plain"
    command = ["make", "-C", str(ROOT / "csrc"), "fakes", f"BUILD={build}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return build / "fakes"


def load_fakes(kernels: Path) -> Fakes:
    """Have the engine of this process take the fakes; `kernels` is where to write what they take for a kernel."""
    folder = build_fakes()
    fakes = Fakes(folder)
    kernels.write_bytes(bytes.fromhex("50ed55ba") + bytes(12))
    from mii_hcache import _io

    with pytest.MonkeyPatch.context() as patch:  # programs that other tests start are to find none of this
        patch.setenv("MII_HCACHE_CUDA_LIB", str(fakes.cuda.path))
        patch.setenv("MII_HCACHE_CUFILE_LIB", str(fakes.cufile.path))
        fakes.cuda["gpus"] = 1
        why_not = _io.why_no_cufile()
    if not fakes.cufile["opened"]:
        pytest.skip("this process has NVIDIA's own libraries loaded")
    assert why_not is None
    fakes.cuda.reset()
    return fakes
