"""NVIDIA's libraries as fakes of ours (tests/native/fakes), for machines without a GPU.

The engine loads them once in a process and keeps them, so they are made to say that there is no GPU when no test uses
them.
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mii_hcache.storage import native

ROOT = Path(__file__).resolve().parents[2]
_QUIET = {
    "fake_cuda": {
        **dict.fromkeys(["gpus", "init_error", "launch_error", "copy_error", "allocate_error", "batch_error"], 0),
        **dict.fromkeys(["register_error", "delayed", "sees_host"], 0),
        "driver_version": 13000,
    },
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


class FakeGpu:
    """What another library has on the fake GPU: memory and a stream."""

    def __init__(self, cuda: Fake) -> None:
        self._library = ctypes.CDLL(str(cuda.path))
        for name in ("fake_cuda_new_stream", "fake_cuda_shadow"):
            getattr(self._library, name).restype = ctypes.c_void_p
        context = ctypes.c_void_p()
        self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
        self._library.cuCtxSetCurrent(context)
        self.stream = int(self._library.fake_cuda_new_stream())
        self._addresses: list[int] = []

    def allocate(self, num_bytes: int) -> int:
        address = ctypes.c_uint64()
        assert self._library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(num_bytes)) == 0
        self._addresses.append(address.value)
        return address.value

    def bytes_at(self, address: int, num_bytes: int) -> bytes:
        """What is there now, whatever is still queued."""
        shadow = self._library.fake_cuda_shadow(ctypes.c_uint64(address), ctypes.c_uint64(num_bytes))
        assert shadow, "no device memory"
        return ctypes.string_at(shadow, num_bytes)

    def run(self, most: int = -1) -> int:
        """Let what is queued on the stream happen; returns how much that was."""
        return int(self._library.fake_cuda_run(ctypes.c_void_p(self.stream), most))

    def close(self) -> None:
        self.run()
        self._library.cuStreamDestroy_v2(ctypes.c_void_p(self.stream))
        for address in self._addresses:
            self._library.cuMemFree_v2(ctypes.c_uint64(address))
        self._library.cuCtxSetCurrent(None)
        self._library.cuDevicePrimaryCtxRelease_v2(0)


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
            left = {name: self.cuda[name] for name in ("contexts", "allocations", "modules", "streams", "pinned")}
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
    build.mkdir(parents=True, exist_ok=True)
    command = ["make", "-C", str(ROOT / "csrc"), "fakes", f"BUILD={build}"]
    with (build / "fakes.lock").open("w") as lock:  # several processes run tests, and each may be the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
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
