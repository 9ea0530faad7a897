"""Reads and writes slots of a store that another process owns, by its directions."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from crc32c import crc32c

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.directions import PayloadDirection, SlotDirection
from mii_hcache.storage.disk_io import Arriving, DiskFile, DiskIO, PartWrite, SlotRead
from mii_hcache.storage.format import SlotHeader
from mii_hcache.storage.lanes import Lanes
from mii_hcache.storage.records import ReadOutcome
from mii_hcache.storage.state_dir import open_private
from mii_hcache.storage.throttled import Throttle

_MAX_UNUSED = 64
"""Files that stay open for the next batch."""


@dataclass(eq=False)
class _Opened:
    file: DiskFile
    num_users: int = 0


class SlotFiles:
    """Any thread; methods block on I/O. Nothing that is read is believed without its header and checksum: directions
    may be wrong, or too old."""

    def __init__(self, io: DiskIO, *, throttle: Throttle | None = None) -> None:
        """Takes `io` over. `throttle`: reads arrive as from a slower device (emulated)."""
        self._io = io
        self._throttle = throttle
        self._lanes = Lanes(io.num_threads, "hcache-slots", num_batches=4)
        self._opened: OrderedDict[str, _Opened] = OrderedDict()
        self._lock = threading.Lock()
        """Guards `_opened`."""

    def read(self, slots: Sequence[SlotDirection], outs: Sequence[memoryview]) -> ReadOutcome:
        """Read payloads into buffers (writable, format `B`, exactly as long), in order of importance, as
        `ChunkStore.get_into`. Does not raise."""
        done_s = None if self._throttle is None else self._throttle.book(sum(out.nbytes for out in outs))
        try:
            outcome = self._read(slots, outs)
        except FileNotFoundError:  # removed since
            outcome = ReadOutcome(num_ok=0, reason="missing")
        except OSError:
            outcome = ReadOutcome(num_ok=0, reason="unavailable")
        if self._throttle is not None and done_s is not None:
            self._throttle.wait(done_s)
        return outcome

    def _read(self, slots: Sequence[SlotDirection], outs: Sequence[memoryview]) -> ReadOutcome:
        with self._files([slot.path for slot in slots]) as files:
            reads = [SlotRead(file, slot.offset, out) for file, slot, out in zip(files, slots, outs, strict=True)]
            with self._io.read(reads) as arriving:
                num_ok, reason = self._lanes.run(
                    len(reads), lambda idx: _finish(arriving, idx, slots[idx].header, outs[idx])
                )
        return ReadOutcome(num_ok=num_ok, reason=reason)

    def write(self, payloads: Sequence[PayloadDirection], chunks: Sequence[memoryview]) -> list[int]:
        """Write byte views where they belong; their CRC32Cs. Raises OSError: then anything may have been written."""
        for payload, chunk in zip(payloads, chunks, strict=True):
            if payload.num_bytes != chunk.nbytes:
                raise OSError(f"{chunk.nbytes} bytes for a payload of {payload.num_bytes}")
        crcs = [crc32c(chunk) for chunk in chunks]
        with self._files([payload.path for payload in payloads]) as files:
            self._io.write_parts(
                [
                    PartWrite(file, payload.offset, chunk)
                    for file, payload, chunk in zip(files, payloads, chunks, strict=True)
                ]
            )
        return crcs

    def close(self) -> None:
        """Close all files; nothing is read or written any more. Idempotent."""
        self._lanes.close()
        with self._lock:
            opened, self._opened = self._opened, OrderedDict()
        for one in opened.values():
            one.file.close()
        self._io.close()

    @contextmanager
    def _files(self, paths: Sequence[str]) -> Iterator[list[DiskFile]]:
        with ExitStack() as uses:
            files = {path: uses.enter_context(self._use(path)) for path in dict.fromkeys(paths)}
            yield [files[path] for path in paths]

    @contextmanager
    def _use(self, path: str) -> Iterator[DiskFile]:
        with self._lock:
            opened = self._opened.get(path)
            if opened is None or _is_gone(opened.file):
                opened = _Opened(self._io.open(open_private(Path(path), os.O_RDWR)))
                replaced = self._opened.get(path)
                self._opened[path] = opened
                if replaced is not None and not replaced.num_users:
                    replaced.file.close()
            opened.num_users += 1
            self._opened.move_to_end(path)
        try:
            yield opened.file
        finally:
            with self._lock:
                opened.num_users -= 1
                if not opened.num_users and self._opened.get(path) is not opened:
                    opened.file.close()
                self._close_unused()

    def _close_unused(self) -> None:
        """Files that were removed would keep their bytes on the disk. Lock held."""
        unused = [(path, opened) for path, opened in self._opened.items() if not opened.num_users]
        for idx, (path, opened) in enumerate(unused):
            if idx < len(unused) - _MAX_UNUSED or _is_gone(opened.file):
                del self._opened[path]
                opened.file.close()


def _is_gone(file: DiskFile) -> bool:
    return os.fstat(file.fd).st_nlink == 0


def _finish(arriving: Arriving, idx: int, header: SlotHeader, out: memoryview) -> str | None:
    try:
        found = arriving.finish(idx)
    except OSError:
        return "unavailable"
    if found is None:
        return "corrupt"  # the file ends early
    if found != header.pack():
        try:
            SlotHeader.parse(found)
        except CorruptChunkError:
            return "corrupt"
        return "missing"  # a sound header of something else: the slot was reused
    return None if crc32c(out) == header.crc else "corrupt"
