"""A raw NVMe namespace through SPDK: its address, and blocks in and out of it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mii_hcache.errors import ConfigError
from mii_hcache.storage.dram import new_buffer
from mii_hcache.storage.native import new_controller, why_no_spdk, why_not_built
from mii_hcache.storage.uring import QUEUE_DEPTH, NativeFile

if TYPE_CHECKING:
    from mii_hcache import _io

HOW_TO_BUILD = (
    "install SPDK as its documentation says (https://spdk.io/doc/getting_started.html, configured --with-shared), then "
    "this package with PKG_CONFIG_PATH=<SPDK's prefix>/lib/pkgconfig"
)
_FAKE = "FAKE"
_SOCKET_MEMORY_MIB = 512


@dataclass(frozen=True, kw_only=True)
class NvmeAddress:
    """Where a namespace is: SPDK's transport id, and some words of ours."""

    transport_id: str
    """`trtype:PCIe traddr:0000:81:00.0`, `trtype:TCP adrfam:IPv4 traddr:... trsvcid:... subnqn:...`, ..."""
    namespace_id: int = 1
    """`ns:NUMBER`"""
    hugepages: bool = True
    """`hugepages:on` or `off`; off for TCP unless it says on: sockets need none."""
    memory_mib: int = 0
    """`memory_mib:NUMBER` that DPDK takes at the start; 0 leaves it to DPDK."""

    @staticmethod
    def parse(text: str) -> NvmeAddress:
        """From `key:value` words. Raises ConfigError naming the word."""
        words = dict(_split(word) for word in text.split())
        if "trtype" not in words or "traddr" not in words:
            raise ConfigError(f"{text!r} is no transport id; write trtype:PCIe traddr:0000:81:00.0, or as SPDK does")
        is_socket = words["trtype"].upper() == "TCP"
        pages = words.pop("hugepages", "off" if is_socket else "on")
        if pages not in ("on", "off"):
            raise ConfigError(f"hugepages must be on or off, got {pages!r}")
        namespace_id = _number("ns", words.pop("ns", "1"))
        memory_mib = _number("memory_mib", words.pop("memory_mib", str(0 if pages == "on" else _SOCKET_MEMORY_MIB)))
        if namespace_id < 1:
            raise ConfigError(f"ns must be at least 1, got {namespace_id}")
        return NvmeAddress(
            transport_id=" ".join(f"{key}:{value}" for key, value in words.items()),
            namespace_id=namespace_id,
            hugepages=pages == "on",
            memory_mib=memory_mib,
        )

    @property
    def is_fake(self) -> bool:
        """`trtype:FAKE traddr:/a/file` is that file, through everything but SPDK: for tests."""
        return self._transport == _FAKE

    @property
    def is_pcie(self) -> bool:
        """Whether the controller is on this machine's bus, where SPDK has to look for it."""
        return self._transport == "PCIE"

    @property
    def _transport(self) -> str:
        return dict(_split(word) for word in self.transport_id.split())["trtype"].upper()

    def __str__(self) -> str:
        return f"{self.transport_id} ns:{self.namespace_id}"


class NvmeController:
    """A connected controller. A process has one connection to a controller, and SPDK's environment once: the first
    address's `hugepages` and `memory_mib` count."""

    def __init__(self, address: NvmeAddress) -> None:
        """Blocks. Raises ConfigError with the reason."""
        why_not = why_not_built() if address.is_fake else why_no_spdk()
        if why_not is not None:
            raise ConfigError(f"{address} cannot be used: {why_not}; {HOW_TO_BUILD}")
        try:
            self.native = new_controller(
                address.transport_id,
                QUEUE_DEPTH,
                hugepages=address.hugepages,
                pci=address.is_pcie,
                memory_mib=address.memory_mib,
                fake=address.is_fake,
            )
        except RuntimeError as error:
            raise ConfigError(f"{address} cannot be used: {error}") from error
        self.about = self.native.describe()
        """`model`, `serial`, `firmware`, `namespaces` (their numbers), `needs_translation`."""

    def close(self) -> None:
        """End the connection. Idempotent; the object is of no use any more."""
        self.native.close()

    def shape(self, namespace_id: int) -> dict[str, int]:
        """`num_bytes`, `sector_bytes` and `max_transfer_bytes`. Raises ConfigError for a namespace of no use."""
        try:
            return self.native.shape(namespace_id)
        except RuntimeError as error:
            raise ConfigError(str(error)) from error


class NvmeFile(NativeFile):
    """A namespace where files are expected: offsets are bytes from its first. Blocks in and out of it, any thread."""

    def __init__(self, address: NvmeAddress) -> None:
        """Connects, and starts the thread that polls. Blocks. Raises ConfigError with the reason."""
        controller = NvmeController(address)
        self._controller = controller.native
        self.address = address
        self.shape = controller.shape(address.namespace_id)
        self.num_bytes = self.shape["num_bytes"]
        try:
            self.device = controller.native.new_device()
            native = controller.native.open(self.device, address.namespace_id)
        except RuntimeError as error:
            raise ConfigError(f"{address} cannot be used: {error}") from error
        super().__init__(-1, native)

    def read_blocks(self, places: list[tuple[int, int]]) -> list[memoryview]:
        """What lies at `(offset, num_bytes)`, whole sectors. Raises OSError."""
        buffers = [new_buffer(num_bytes) for _, num_bytes in places]
        self._transfer(False, [(offset, buffer) for (offset, _), buffer in zip(places, buffers, strict=True)])
        return buffers

    def write_blocks(self, blocks: list[tuple[int, bytes]]) -> None:
        """Write `(offset, block)`, whole sectors; durable after `flush`. Raises OSError."""
        self._transfer(True, [(offset, memoryview(block)) for offset, block in blocks])

    def flush(self) -> None:
        """Make what was written durable. Raises OSError."""
        result = self.device.flush(self.native)
        if result < 0:
            raise _error(result)

    def close(self) -> None:
        """End the thread and the connection. Idempotent."""
        super().close()
        self.device.close()
        self._controller.close()

    def map_gpu(self, address: int, num_bytes: int, library: str = "libgdrapi.so.2") -> _io.GpuWindow:
        """Memory of a GPU that transfers may name, as a buffer: whole pages of 64 KiB of it, pinned through GDRCopy
        until nothing refers to the window. `address` is the GPU's, of memory that outlives the window. Proven by
        reading the superblock into it. Blocks. Raises ConfigError with the reason.

        Never run on a GPU. The GPU sees what arrived for certain only in kernels that are launched after it.
        """
        try:
            return self._controller.map_gpu(self.device, self.native, 0, address, num_bytes, library)
        except RuntimeError as error:
            raise ConfigError(f"{self.address} cannot read into the GPU's memory: {error}") from error

    def _transfer(self, is_write: bool, parts: list[tuple[int, memoryview]]) -> None:
        batch = self.device.submit([(is_write, self.native, offset, buffer) for offset, buffer in parts])
        try:
            results = batch.wait_all()
        finally:
            batch.close()
        for (_, buffer), result in zip(parts, results, strict=True):
            if result != len(buffer):
                raise _error(result if result < 0 else -errno.EIO)


def _split(word: str) -> tuple[str, str]:
    key, colon, value = word.partition(":")
    if not (key and colon and value):
        raise ConfigError(f"{word!r} in a transport id is not of the form key:value")
    return key, value


def _number(key: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{key} must be a number, got {text!r}")
    return int(text)


def _error(result: int) -> OSError:
    return OSError(-result, os.strerror(-result))
