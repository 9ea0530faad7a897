"""One pass over the same bytes each: by fio, by the engine itself, by stores on either backend, and by memcpy."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from crc32c import crc32c

from mii_hcache import _io
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.layout import SpanLayout
from mii_hcache.storage.base import ChunkRead, SpanRecord
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.stripe_set import StripeSet
from mii_hcache.storage.striped import StripedStore

QUEUE_DEPTH = 32
WINDOW_BYTES = 64 << 20
"""Memory that chunks are read into again and again, as a restore's buffers are."""
NUM_LAYERS = 8


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a pass took."""

    num_bytes: int
    wall_s: float
    cpu_s: float
    """Of all threads, user and system."""

    def row(self) -> dict[str, float]:
        gigabytes = self.num_bytes / 1e9
        return {
            "gb_per_s": round(gigabytes / self.wall_s, 4),
            "cpu_s_per_gb": round(self.cpu_s / gigabytes, 5),
            "num_bytes": self.num_bytes,
        }


def measured(num_bytes: int, job: Callable[[], object]) -> Cost:
    """Run `job` in this process."""
    before, start_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    job()
    wall_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(num_bytes=num_bytes, wall_s=wall_s, cpu_s=cpu_s)


def aligned(num_bytes: int, fill: int = 0) -> memoryview:
    """Page-aligned memory whose pages are there."""
    memory = memoryview(mmap.mmap(-1, num_bytes))
    memory[:] = bytes([fill]) * num_bytes
    return memory


def fio(files: list[Path], file_bytes: int, chunk_bytes: int, *, is_write: bool) -> Cost | None:
    """The yardstick: fio's io_uring with registered buffers and files, one thread. None where it is not installed."""
    if shutil.which("fio") is None:
        return None
    done = subprocess.run(
        [
            *(
                "fio",
                "--name=yardstick",
                "--ioengine=io_uring",
                "--fixedbufs=1",
                "--registerfiles=1",
                "--nonvectored=1",
            ),
            *("--direct=1", f"--rw={'write' if is_write else 'read'}", f"--bs={chunk_bytes}"),
            *(
                f"--iodepth={QUEUE_DEPTH}",
                f"--filename={':'.join(map(str, files))}",
                "--overwrite=1",
                "--fallocate=none",
            ),
            *("--file_service_type=roundrobin:1", f"--filesize={file_bytes}", "--output-format=json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    (job,) = json.loads(done.stdout)["jobs"]
    side = job["write" if is_write else "read"]
    wall_s = side["runtime"] / 1e3
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    return Cost(num_bytes=side["io_bytes"], wall_s=wall_s, cpu_s=cpu_s)


def engine(files: list[Path], file_bytes: int, chunk_bytes: int, *, is_write: bool, lent: bool) -> Cost:
    """The engine without a store: chunks round robin over the files, memory registered or not."""
    device = _io.Device(QUEUE_DEPTH)
    fds = [os.open(path, os.O_RDWR) for path in files]
    opened = [device.open(fd) for fd in fds]
    window = aligned(WINDOW_BYTES, 7)
    if lent and not device.lend(window):
        raise RuntimeError("the window could not be registered")
    chunks = [window[start : start + chunk_bytes] for start in range(0, WINDOW_BYTES, chunk_bytes)]
    half = len(chunks) // 2

    def work() -> None:
        flying: list[_io.Batch] = []
        requests = [
            (is_write, file, start, chunk_bytes) for start in range(0, file_bytes, chunk_bytes) for file in opened
        ]
        for number, start in enumerate(range(0, len(requests), half)):  # one half of the window flies, one is refilled
            part = requests[start : start + half]
            own = chunks[number % 2 * half :]
            if len(flying) == 2:
                _check(flying.pop(0), chunk_bytes)
            flying.append(device.submit([(w, file, at, own[idx]) for idx, (w, file, at, _) in enumerate(part)]))
        for batch in flying:
            _check(batch, chunk_bytes)

    cost = measured(file_bytes * len(files), work)
    for file in opened:
        file.close()
    device.close()
    for fd in fds:
        os.close(fd)
    return cost


def _check(batch: _io.Batch, chunk_bytes: int) -> None:
    wrong = [result for result in batch.wait_all() if result != chunk_bytes]
    if wrong:
        raise RuntimeError(f"{len(wrong)} transfers failed, first as {wrong[0]}")
    batch.close()


def store(folders: Sequence[Path], num_bytes: int, chunk_bytes: int, io: str) -> tuple[Cost, Cost]:
    """Put and flush, then read back layer by layer, as a restore does, the page cache dropped. With checksums. Several
    folders are striped over."""
    layout = SpanLayout.shared((ChunkKind.HIDDEN,) * NUM_LAYERS, chunk_bytes, chunk_bytes)
    num_spans = num_bytes // layout.num_bytes
    records = [
        SpanRecord(
            span_id=hashlib.blake2b(b"%d" % idx, digest_size=32).digest(),
            parent_id=hashlib.blake2b(b"%d" % (idx - 1), digest_size=32).digest() if idx else None,
            span_idx=idx,
            token_ids=bytes(256),
            layout=layout,
        )
        for idx in range(num_spans)
    ]
    window = aligned(max(num_spans, NUM_LAYERS) * chunk_bytes, 3)  # lent, as the restorer's is, for the reads
    chunks = [window[idx * chunk_bytes : (idx + 1) * chunk_bytes] for idx in range(max(num_spans, NUM_LAYERS))]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    capacity_bytes = 4 * num_bytes * len(folders)
    with ExitStack() as stack:
        for folder in folders:
            stack.callback(shutil.rmtree, folder)
        opened: FileStore | StripedStore
        if len(folders) > 1:
            opened = open_striped(StripeSet.of(folders), capacity_bytes, io=io, flush_interval_s=None)
        else:
            state_dir = StateDir(folders[0])
            stack.callback(state_dir.close)
            opened = FileStore(state_dir, capacity_bytes, io=io, flush_interval_s=None)
        stack.callback(opened.close)

        def write() -> None:
            for record in records:
                if not opened.put(record, chunks[:NUM_LAYERS]):
                    raise RuntimeError("a put was dropped")
            opened.flush()

        def read() -> None:
            for layer_idx in range(NUM_LAYERS):
                reads = [
                    ChunkRead(span_id=record.span_id, layer_idx=layer_idx, out=chunks[idx])
                    for idx, record in enumerate(records)
                ]
                if opened.get_into(reads).num_ok != num_spans:
                    raise RuntimeError("a read failed")

        written = measured(num_spans * layout.num_bytes, write)
        drop_cache(path for folder in folders for path in folder.rglob("*.seg"))
        opened.lend(window)
        return written, measured(num_spans * layout.num_bytes, read)


def drop_cache(files: object) -> None:
    """Have the kernel forget what it keeps of files."""
    for path in files:  # type: ignore[attr-defined]
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def checksum(num_bytes: int, chunk_bytes: int) -> Cost:
    """Verification alone, on memory that is not in the CPU's caches."""
    window = aligned(WINDOW_BYTES, 5)
    starts = [start % WINDOW_BYTES for start in range(0, num_bytes, chunk_bytes)]
    return measured(num_bytes, lambda: [crc32c(window[start : start + chunk_bytes]) for start in starts])


def dram(num_bytes: int, chunk_bytes: int, num_threads: int) -> Cost:
    """The DRAM engine: chunks of one large buffer into another."""
    copier = _io.Copier(num_threads)
    source, target = aligned(4 * WINDOW_BYTES, 1), aligned(4 * WINDOW_BYTES, 2)
    pairs = [
        (target[start : start + chunk_bytes], source[start : start + chunk_bytes])
        for start in range(0, 4 * WINDOW_BYTES, chunk_bytes)
    ]
    rounds = max(1, num_bytes // (4 * WINDOW_BYTES))
    return measured(rounds * 4 * WINDOW_BYTES, lambda: [copier.run(pairs) for _ in range(rounds)])


def memcpy(num_bytes: int, num_threads: int) -> Cost:
    """The yardstick: each thread copies its share of the same buffers by one call of memcpy."""
    import ctypes
    from concurrent.futures import ThreadPoolExecutor

    source, target = aligned(4 * WINDOW_BYTES, 1), aligned(4 * WINDOW_BYTES, 2)
    share = 4 * WINDOW_BYTES // num_threads
    array = ctypes.c_char * share
    ends = [
        (array.from_buffer(target, idx * share), array.from_buffer(source, idx * share)) for idx in range(num_threads)
    ]
    rounds = max(1, num_bytes // (4 * WINDOW_BYTES))
    with ThreadPoolExecutor(num_threads) as pool:

        def work() -> None:
            for _ in range(rounds):
                list(pool.map(lambda end: ctypes.memmove(*end, share), ends))

        return measured(rounds * share * num_threads, work)
