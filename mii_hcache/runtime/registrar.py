"""Host memory made known to a GPU, so that copies need no detour; and the CPUs that are near it. Not run on one yet."""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE: pinned for every context of the process."""
_SYS = Path("/sys")


class Registrar(ABC):
    """Pins memory for a device. Any thread."""

    near_cpus: frozenset[int] = frozenset()
    """CPUs whose memory is nearest to the device; empty: not known, or it makes no difference."""

    @abstractmethod
    def register(self, address: int, num_bytes: int) -> None:
        """Pin `[address, address + num_bytes)`, whole pages that are there already. Raises OSError with the reason."""

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Undo the `register` that began there, before the memory is freed; nothing is copied to or from it any more.
        Raises OSError."""


class DriverRegistrar(Registrar):
    """By the driver itself. torch's way (`torch.cuda.cudart`) is the runtime's, where a refusal would stay behind as
    the last error and fail the next kernel launch; and torch's own pinned memory comes in powers of two."""

    def __init__(self, device_idx: int, library: Any = None) -> None:
        """`library`: libcuda, None to load it. Raises OSError."""
        self._cuda = ctypes.CDLL("libcuda.so.1") if library is None else library
        self._pid = os.getpid()
        self._call("cuInit", ctypes.c_uint(0))
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(device_idx))
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)  # torch's; for the process's life
        bus_id = ctypes.create_string_buffer(32)
        self._call("cuDeviceGetPCIBusId", bus_id, ctypes.c_int(len(bus_id)), device)
        self.near_cpus = cpus_near(bus_id.value.decode())

    def register(self, address: int, num_bytes: int) -> None:
        with self._in_context():
            self._call(
                "cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_uint(_PORTABLE)
            )

    def unregister(self, address: int) -> None:
        if os.getpid() == self._pid:  # a fork has no share in it
            with self._in_context():
                self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        """Threads of ours have no context of their own."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._cuda, name)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(ctypes.c_int(error), ctypes.byref(text))
            raise OSError(f"{name}: {(text.value or b'error').decode()} ({error})")


def cpus_near(bus_id: str, sys: Path = _SYS) -> frozenset[int]:
    """Usable CPUs of the NUMA node that a PCI device (`0000:65:00.0`) hangs on; empty where that is not known, there is
    one node only, or we may use none of its CPUs. A virtual machine may hide it."""
    nodes = sys / "devices" / "system" / "node"
    try:
        node = int((sys / "bus" / "pci" / "devices" / bus_id.lower() / "numa_node").read_text(encoding="ascii"))
        if node < 0 or len(list(nodes.glob("node[0-9]*"))) < 2:
            return frozenset()
        listed = (nodes / f"node{node}" / "cpulist").read_text(encoding="ascii")
    except (OSError, ValueError):
        return frozenset()
    cpus: set[int] = set()
    for part in listed.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus & os.sched_getaffinity(0))
