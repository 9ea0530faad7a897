"""A saved store to damage, and what is looked at afterwards."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.storage.file import FileStore
from tests.storage.storage_kit import (
    StoreKit,
    holds,
    make_record,
)

RECORDS = [
    make_record(idx, kind=ChunkKind.KV if idx % 2 else ChunkKind.HIDDEN, **({"chunk_bytes": 900} if idx > 7 else {}))
    for idx in range(10)
]


def segment_of(kit: StoreKit, number: int = 1) -> Path:
    return kit.path / "segments" / f"{number:08d}.seg"


def rows(kit: StoreKit) -> dict[bytes, list[tuple[int, int]]]:
    """Places of each span, as the catalog has them."""
    connection = sqlite3.connect(kit.path / "catalog.sqlite")
    found = connection.execute("SELECT span_id, places FROM span").fetchall()
    connection.close()
    words = {span_id: memoryview(places).cast("I").tolist() for span_id, places in found}
    return {span_id: list(zip(w[::3], w[1::3], strict=True)) for span_id, w in words.items()}


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def held(store: FileStore) -> list[bool]:
    return [holds(store, record) for record in RECORDS]
