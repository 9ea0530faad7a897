"""A namespace for tests: a file, through everything but SPDK."""

from __future__ import annotations

from pathlib import Path

from mii_hcache.storage import pyspdk
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.format import BLOCK_BYTES
from mii_hcache.storage.state_dir import StateDir
from tests.storage.storage_kit import SPAN_DISK_BYTES

REGION_BYTES = 1 << 20


class Site:
    """A state directory, and a file as the namespace that it keeps its segments on."""

    def __init__(self, path: Path, num_bytes: int = 20 << 20, words: str = "") -> None:
        self.image, self.state = path / "namespace.img", path / "state"
        with self.image.open("wb") as file:
            file.truncate(num_bytes)
        self.trid = f"trtype:FAKE traddr:{self.image}{words}"
        self._open: list[StateDir | FileStore] = []

    def format(self, *words: str) -> int:
        return pyspdk.main(["format", "--trid", self.trid, "--state-dir", str(self.state), "--region-mib", "1", *words])

    def open(self, capacity_bytes: int = 100 * SPAN_DISK_BYTES, **options) -> FileStore:
        self.close()
        self._open = [StateDir(self.state)]
        self._open.append(store := FileStore(self._open[0], capacity_bytes, **options))
        return store

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def block(self, number: int) -> bytes:
        return self.image.read_bytes()[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]

    def overwrite(self, offset: int, content: bytes) -> None:
        with self.image.open("r+b") as file:
            file.seek(offset)
            file.write(content)
