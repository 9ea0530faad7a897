"""A file store's chunks, read into device memory: headers by the CPU, payloads around it, verified on the GPU."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from crc32c import crc32c

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.base import DeviceReader
from mii_hcache.storage.device_io import DeviceIO, PayloadRead
from mii_hcache.storage.disk_io import DiskIO
from mii_hcache.storage.dram import new_buffer
from mii_hcache.storage.format import SlotHeader
from mii_hcache.storage.index import FileIndex, HeldSpan
from mii_hcache.storage.records import DeviceRead, ReadOutcome
from mii_hcache.storage.segment_space import StaleSlotError
from mii_hcache.storage.segments import Segments

_log = logging.getLogger(__name__)

WINDOW_CHUNKS = 32
"""Chunks that are verified together, while as many more are on their way."""

HeaderOf = Callable[[HeldSpan, int], SlotHeader]
"""The header that a chunk's slot must carry."""
Forget = Callable[[HeldSpan, int, str], None]
"""Forget a span whose chunk was found `missing` or `corrupt`."""
Found = tuple[HeldSpan, int]
"""A span, and which of its chunks."""


class FileDeviceReader(DeviceReader):
    """Of one store and one GPU.

    A payload that is aligned goes from the file into place. One that is not (an odd row size, an odd address), and one
    that cuFile fails at, is read into host memory, verified by the CPU, and copied.
    """

    def __init__(
        self, device: DeviceIO, index: FileIndex, segments: Segments, header_of: HeaderOf, forget: Forget
    ) -> None:
        """`device` is taken over."""
        self._device = device
        self._index = index
        self._segments = segments
        self._header_of = header_of
        self._forget = forget
        self.num_direct = 0
        """Chunks that came without a detour."""
        self.num_bounced = 0
        """Chunks that came by way of host memory."""

    def get_into(self, reads: Sequence[DeviceRead]) -> ReadOutcome:
        by_place = sorted(reads, key=lambda read: read.address)
        if any(before.address + before.num_bytes > after.address for before, after in pairwise(by_place)):
            raise ValueError("chunks are to be read over one another")
        with self._index.operation() as is_open:
            found = self._index.begin_reads(reads) if is_open else []
            try:
                num_ok, reason = self._read(reads, found)
                if reason in ("missing", "corrupt"):
                    self._forget(*found[num_ok], reason)
            finally:
                self._index.end_reads(found)
            with self._index.lock:
                self._index.counters.read_bytes += sum(read.num_bytes for read in reads[:num_ok])
        if reason is None and num_ok < len(reads):
            reason = "missing"
        return ReadOutcome(num_ok=num_ok, reason=reason)

    def lend(self, address: int, num_bytes: int) -> bool:
        with self._index.operation() as is_open:
            return is_open and self._device.lend(address, num_bytes)

    def take_back(self, address: int, num_bytes: int) -> None:
        with self._index.operation() as is_open:
            if is_open:
                self._device.take_back(address, num_bytes)

    def close(self) -> None:
        """Release the GPU; no other call is running. Idempotent."""
        self._device.close()

    def _read(self, reads: Sequence[DeviceRead], found: Sequence[Found]) -> tuple[int, str | None]:
        """How many leading chunks of `found` arrived verified, and why the next one did not."""
        num_ok = 0
        with ExitStack() as stack:
            ahead: deque[_Window] = deque()
            for start in range(0, len(found), WINDOW_CHUNKS):
                part = slice(start, min(start + WINDOW_CHUNKS, len(found)))
                ahead.append(_Window(self._device, self._segments, self._header_of, reads[part], found[part]))
                stack.callback(ahead[-1].close)
                is_last = part.stop == len(found)
                while len(ahead) > (0 if is_last else 1):
                    window_ok, reason = self._finish(ahead.popleft())
                    num_ok += window_ok
                    if reason is not None:
                        return num_ok, reason
        return num_ok, None

    def _finish(self, window: _Window) -> tuple[int, str | None]:
        outcome = window.finish()
        window.close()
        with self._index.lock:
            self.num_direct += window.num_direct
            self.num_bounced += window.num_bounced
        return outcome


class _Window:
    """Some chunks on their way. `close` ends what is in flight."""

    def __init__(
        self,
        device: DeviceIO,
        segments: Segments,
        header_of: HeaderOf,
        reads: Sequence[DeviceRead],
        found: Sequence[Found],
    ) -> None:
        self._device = device
        self._segments = segments
        self._header_of = header_of
        self._reads = reads
        self._found = found
        self.num_direct = self.num_bounced = 0
        self._buffers: dict[int, memoryview] = {}
        """Host memory of the chunks that take the detour."""
        self._payload_idx: dict[int, int] = {}
        """Which of the device's reads a chunk is."""
        payloads: list[PayloadRead] = []
        slots = []
        for idx, (read, (span, chunk_idx)) in enumerate(zip(reads, found, strict=True)):
            place = span.places[chunk_idx]
            where = self._segments.where(place)
            if where is not None and (read.address | read.num_bytes) % device.align_bytes == 0:
                self._payload_idx[idx] = len(payloads)
                payloads.append(PayloadRead(*where, read.address, read.num_bytes))
                slots.append((place, memoryview(bytearray())))
            else:
                self._buffers[idx] = new_buffer(read.num_bytes)
                slots.append((place, self._buffers[idx]))
        with ExitStack() as undo:
            self._payloads = undo.enter_context(device.read(payloads))
            self._slots = undo.enter_context(segments.reading(slots))
            self._open = undo.pop_all()

    def finish(self) -> tuple[int, str | None]:
        """Wait for all; how many leading chunks are in place and verified, and why the next one is not."""
        reason = None
        num_arrived = 0
        on_device: list[int] = []
        """Chunks that only the GPU can verify."""
        for idx in range(len(self._reads)):
            reason = self._arrive(idx, on_device)
            if reason is not None:
                break
            num_arrived += 1
        if on_device:
            reads = [self._reads[idx] for idx in on_device]
            try:
                crcs = self._device.crc32c([(read.address, read.num_bytes) for read in reads])
            except OSError as error:
                _log.warning("the GPU cannot verify what it was given: %s", error)
                return on_device[0], "unavailable"
            for idx, crc in zip(on_device, crcs, strict=True):
                span, chunk_idx = self._found[idx]
                if crc != span.crcs[chunk_idx]:
                    return idx, "corrupt"
        return num_arrived, reason

    def close(self) -> None:
        """Idempotent."""
        self._open.close()

    def _arrive(self, idx: int, on_device: list[int]) -> str | None:
        """Wait for a chunk and check its header; its payload is in place then, verified unless it joins `on_device`."""
        header = self._header_of(*self._found[idx])
        try:
            self._slots.finish(idx, header)
            buffer = self._buffers.get(idx)
            if buffer is None:
                try:
                    if not self._payloads.finish(self._payload_idx[idx]):
                        raise CorruptChunkError("the file ends early")
                    on_device.append(idx)
                    self.num_direct += 1
                    return None
                except OSError as error:
                    _log.warning("cuFile failed (%s): a chunk is read through host memory", error)
                    buffer = self._read_again(idx, header)
            if crc32c(buffer) != header.crc:
                raise CorruptChunkError("wrong checksum")
        except StaleSlotError:
            return "missing"
        except CorruptChunkError:
            return "corrupt"
        except OSError as error:
            _log.warning("a chunk cannot be read now: %s", error)
            return "unavailable"
        try:
            self._device.copy_in(self._reads[idx].address, buffer)
        except OSError as error:
            _log.warning("a chunk cannot be copied to the GPU: %s", error)
            return "unavailable"
        self.num_bounced += 1
        return None

    def _read_again(self, idx: int, header: SlotHeader) -> memoryview:
        span, chunk_idx = self._found[idx]
        buffer = new_buffer(self._reads[idx].num_bytes)
        with self._segments.reading([(span.places[chunk_idx], buffer)]) as arriving:
            arriving.finish(0, header)
        return buffer


class DeviceReaders:
    """A store's readers by GPU, opened when they are first asked for. Thread-safe."""

    def __init__(self, io: DiskIO, scratch: Path, make: Callable[[DeviceIO], FileDeviceReader]) -> None:
        """`scratch`: a directory of the disk that is read."""
        self._io = io
        self._scratch = scratch
        self._make = make
        self._lock = threading.Lock()
        self._by_gpu: dict[int, FileDeviceReader | None] = {}

    def of(self, gpu_idx: int) -> FileDeviceReader | None:
        """See `ChunkStore.device_reader`."""
        with self._lock:
            if gpu_idx not in self._by_gpu:
                device = self._io.open_device(gpu_idx, self._scratch)
                self._by_gpu[gpu_idx] = None if device is None else self._make(device)
            return self._by_gpu[gpu_idx]

    def close(self) -> None:
        """Close them; no read is running, and no more are made. Idempotent."""
        with self._lock:
            readers = list(self._by_gpu.values())
            self._by_gpu = dict.fromkeys(self._by_gpu)
        for reader in readers:
            if reader is not None:
                reader.close()
