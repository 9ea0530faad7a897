"""Slots through SPDK: no kernel, no page cache, a thread of our own that polls. Never run on NVMe hardware."""

from __future__ import annotations

from mii_hcache.storage.disk_io import DiskFile
from mii_hcache.storage.nvme import NvmeAddress, NvmeFile
from mii_hcache.storage.uring import NativeIO


class SpdkIO(NativeIO):
    """A namespace, its queue and its thread, which takes a core while anything is in flight. Memory that the device
    cannot reach is copied by that thread."""

    name = "spdk"

    def __init__(self, address: str) -> None:
        """Blocks. Raises ConfigError with the reason."""
        self.namespace = NvmeFile(NvmeAddress.parse(address))
        super().__init__(self.namespace.device)

    def open(self, fd: int) -> DiskFile:
        raise NotImplementedError("a namespace has no files: segments lie in its regions")

    def close(self) -> None:
        self.namespace.close()
