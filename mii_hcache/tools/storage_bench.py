"""What is measured of storage, in which order, and for how long."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mii_hcache.runtime.machine import filesystem_of
from mii_hcache.storage.copying import num_copying_threads
from mii_hcache.tools import device_passes, dram_passes, store_passes
from mii_hcache.tools.cost import Cost, Median
from mii_hcache.tools.device_passes import Files, make_files
from mii_hcache.tools.scratch import scratch

MAIN_CHUNK_BYTES = 512 << 10
"""A layer's 64 tokens of a 4096-wide model in 16 bits: what depths, checksums and stores are measured with."""
_STORE_BYTES = 64 << 20
_LEAST_PASS_S, _MOST_PASS_S = 0.05, 1.5


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one row is about."""

    what: str
    """`device` (payloads, no store), `store` (all that saving and restoring does), `checksum`, `copy` (in DRAM)."""
    backend: str
    """`uring`, `threads`, `fio`; `memcpy`, `copier`, `memory`; `crc32c`."""
    side: str
    """`read`, `write`, or `copy`."""
    chunk_bytes: int
    queue_depth: int | None = None
    """Requests in flight; threads, where the backend is `threads` or copies memory."""
    checksums: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came out."""

    point: Point
    median: Median

    @property
    def iops(self) -> float:
        """Chunks a second."""
        return self.median.gb_per_s * 1e9 / self.point.chunk_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rounded = {name: round(value, 5) for name, value in asdict(self.median).items()}
        return {**asdict(self.point), **rounded, "iops": round(self.iops, 1)}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to measure."""

    backends: Sequence[str]
    """Of `uring`, `threads`."""
    chunk_sizes: Sequence[int]
    queue_depths: Sequence[int]
    num_bytes: int
    """Of scratch files, and so the most that a pass moves through the page cache."""
    seconds: float
    """For everything together; each row has at least one pass, also if that takes longer."""
    repeats: int
    with_fio: bool

    @property
    def main_chunk_bytes(self) -> int:
        """The chunk size of rows that have only one."""
        return min(self.chunk_sizes, key=lambda chunk_bytes: abs(chunk_bytes - MAIN_CHUNK_BYTES))

    @property
    def store_bytes(self) -> int:
        """Moved by a pass through a store: a span at least."""
        return max(min(self.num_bytes, _STORE_BYTES), store_passes.NUM_LAYERS * self.main_chunk_bytes)

    @property
    def disk_bytes(self) -> int:
        """What a directory must have room for."""
        return self.num_bytes + 2 * self.store_bytes

    def shapes(self) -> list[tuple[int, int]]:
        """`(chunk_bytes, queue_depth)`: all sizes at the deepest queue, all depths at the main size."""
        deepest, main = max(self.queue_depths), self.main_chunk_bytes
        return [
            *((chunk_bytes, deepest) for chunk_bytes in sorted(self.chunk_sizes)),
            *((main, depth) for depth in sorted(self.queue_depths, reverse=True) if depth != deepest),
        ]


Pass = Callable[[float], dict[Point, Cost]]
"""Runs for about so many seconds."""


@dataclass(kw_only=True)
class Bench:
    """Rounds of passes until the time is up. In each round every row has its turn, a yardstick right beside what it
    measures: what else the machine and the disk do meets them all alike."""

    wanted: Wanted
    progress: Callable[[int, int], None]
    _costs: dict[Point, list[Cost]] = field(default_factory=lambda: defaultdict(list))

    def directory(self, directory: Path, seconds: float) -> dict[str, Any]:
        """Measure files in a directory. Raises ConfigError when there is too little room, HCacheError when a pass
        fails."""
        wanted = self.wanted
        self._costs.clear()
        with scratch(directory, wanted.disk_bytes) as folder:
            paths = [folder / "a", folder / "b"]  # as many files as a store fills side by side
            make_files(paths, wanted.num_bytes // len(paths))
            files = Files(paths=paths, file_bytes=wanted.num_bytes // len(paths), chunk_bytes=wanted.main_chunk_bytes)
            is_direct = device_passes.takes_direct(paths[0])
            self._run(self._file_passes(files, folder, with_fio=wanted.with_fio and is_direct), seconds)
            kind = filesystem_of(directory)
        return {"state_dir": str(directory), "filesystem": kind, "direct": is_direct, "rows": self._rows()}

    def memory(self, seconds: float) -> list[Row]:
        """Measure the DRAM tier and the checksum."""
        self._costs.clear()
        self._run(self._memory_passes(), seconds)
        return self._rows()

    def _run(self, passes: Sequence[Pass], seconds: float) -> None:
        stop_s = time.monotonic() + seconds
        num_all = self.wanted.repeats * len(passes)
        for number in range(num_all):
            left_s = stop_s - time.monotonic()
            if left_s <= 0 and number >= len(passes):
                break
            self.progress(number, num_all)
            share_s = 0.7 * left_s / (num_all - number)  # the rest goes to opening, dropping pages, fio's start
            for point, cost in passes[number % len(passes)](min(max(share_s, _LEAST_PASS_S), _MOST_PASS_S)).items():
                self._costs[point].append(cost)

    def _rows(self) -> list[Row]:
        return [Row(point=point, median=Median.of(costs)) for point, costs in self._costs.items()]

    def _file_passes(self, files: Files, folder: Path, *, with_fio: bool) -> list[Pass]:
        wanted, passes = self.wanted, list[Pass]()
        lent = "uring" in wanted.backends and device_passes.may_register()
        for side in ("read", "write"):
            for chunk_bytes, depth in wanted.shapes():
                point = Point(what="device", backend="", side=side, chunk_bytes=chunk_bytes, queue_depth=depth)
                cut = replace(files, chunk_bytes=chunk_bytes)
                if with_fio:
                    passes.append(_fio_pass(replace(point, backend="fio"), cut))
                for backend in wanted.backends:
                    own = replace(point, backend=backend)
                    passes.append(_device_pass(own, cut, lent))
                    if (chunk_bytes, depth) == (wanted.main_chunk_bytes, max(wanted.queue_depths)):
                        passes.append(_device_pass(replace(own, checksums=True), cut, lent))
        for backend in wanted.backends:
            passes.append(_store_pass(backend, folder / "state", wanted))
        return passes

    def _memory_passes(self) -> list[Pass]:
        chunk_bytes, passes = self.wanted.main_chunk_bytes, list[Pass]()
        num_bytes = min(self.wanted.num_bytes, dram_passes.BUFFER_BYTES)
        for num_threads in sorted({1, num_copying_threads()}):
            copy = Point(what="copy", backend="", side="copy", chunk_bytes=chunk_bytes, queue_depth=num_threads)
            passes.append(_memcpy_pass(replace(copy, backend="memcpy"), num_bytes))
            passes.append(_copies_pass(replace(copy, backend="copier"), num_bytes))
        passes.append(_memory_store_pass(chunk_bytes, self.wanted.store_bytes))
        passes.append(_checksum_pass(chunk_bytes, num_bytes))
        return passes


def _fio_pass(point: Point, files: Files) -> Pass:
    def run(limit_s: float) -> dict[Point, Cost]:
        assert point.queue_depth is not None
        is_write = point.side == "write"
        return {
            point: device_passes.fio(files, is_write=is_write, queue_depth=point.queue_depth, limit_s=limit_s),
        }

    return run


def _device_pass(point: Point, files: Files, lent: bool) -> Pass:
    def run(limit_s: float) -> dict[Point, Cost]:
        assert point.queue_depth is not None
        is_write, depth = point.side == "write", point.queue_depth
        if point.backend == "uring":
            cost = device_passes.uring(
                files, is_write=is_write, queue_depth=depth, lent=lent, checksums=point.checksums, limit_s=limit_s
            )
        else:
            cost = device_passes.threads(
                files, is_write=is_write, queue_depth=depth, checksums=point.checksums, limit_s=limit_s
            )
        return {point: cost}

    return run


def _store_pass(backend: str, folder: Path, wanted: Wanted) -> Pass:
    point = Point(what="store", backend=backend, side="", chunk_bytes=wanted.main_chunk_bytes, checksums=True)

    def run(_: float) -> dict[Point, Cost]:
        written, read = store_passes.file_store([folder], wanted.store_bytes, wanted.main_chunk_bytes, backend)
        return {replace(point, side="read"): read, replace(point, side="write"): written}

    return run


def _memcpy_pass(point: Point, num_bytes: int) -> Pass:
    assert point.queue_depth is not None
    num_threads = point.queue_depth
    return lambda _: {point: dram_passes.memcpy(num_bytes, num_threads, buffer_bytes=num_bytes)}


def _copies_pass(point: Point, num_bytes: int) -> Pass:
    assert point.queue_depth is not None
    num_threads = point.queue_depth
    return lambda _: {
        point: dram_passes.copies(num_bytes, point.chunk_bytes, num_threads, buffer_bytes=num_bytes),
    }


def _memory_store_pass(chunk_bytes: int, num_bytes: int) -> Pass:
    point = Point(what="store", backend="memory", side="", chunk_bytes=chunk_bytes, checksums=True)

    def run(_: float) -> dict[Point, Cost]:
        written, read = dram_passes.memory_store(num_bytes, chunk_bytes)
        return {replace(point, side="read"): read, replace(point, side="write"): written}

    return run


def _checksum_pass(chunk_bytes: int, num_bytes: int) -> Pass:
    point = Point(
        what="checksum", backend="crc32c", side="read", chunk_bytes=chunk_bytes, queue_depth=1, checksums=True
    )
    return lambda _: {point: store_passes.checksum(num_bytes, chunk_bytes)}
