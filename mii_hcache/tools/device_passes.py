"""One pass over files without a store: by fio, by the native engine, by Python's threads. Payloads only, in chunks that
go round robin over the files; what a store adds is measured in `store_passes`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from crc32c import crc32c

from mii_hcache.errors import HCacheError
from mii_hcache.storage.disk_io import read_all, write_all
from mii_hcache.storage.native import new_device
from mii_hcache.tools.cost import Cost, aligned, measured

if TYPE_CHECKING:
    from mii_hcache import _io

WINDOW_BYTES = 64 << 20
"""Most memory that chunks are read into again and again, as a restore's buffers are."""
FIO_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files of one size to read and overwrite, and in which pieces."""

    paths: Sequence[Path]
    file_bytes: int
    chunk_bytes: int

    @property
    def num_bytes(self) -> int:
        """Whole chunks of all files."""
        return len(self.paths) * self.num_chunks_per_file * self.chunk_bytes

    @property
    def num_chunks_per_file(self) -> int:
        """The odd rest of a file is left alone."""
        return self.file_bytes // self.chunk_bytes

    def place(self, idx: int) -> tuple[int, int]:
        """File and offset of chunk `idx`; after the last one it starts over."""
        row, file_idx = divmod(idx, len(self.paths))
        return file_idx, row % self.num_chunks_per_file * self.chunk_bytes


def make_files(paths: Iterable[Path], file_bytes: int) -> None:
    """Files without holes, on the disk. Raises OSError."""
    block = os.urandom(min(file_bytes, 1 << 20))
    for path in paths:
        with path.open("wb") as file:
            for start in range(0, file_bytes, len(block)):
                file.write(block[: file_bytes - start])
            file.flush()
            os.fsync(file.fileno())


def drop_pages(paths: Iterable[Path]) -> None:
    """Have the kernel forget what it keeps of files, so that the next read comes from the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def takes_direct(path: Path) -> bool:
    """Whether a file's file system has direct I/O. Some say so when it is opened, others at the first transfer."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.preadv(fd, [aligned(4096)], 0)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def may_register() -> bool:
    """Whether this user may have as much memory registered with a ring as `uring` wants (`ulimit -l`)."""
    device = new_device(1)
    try:
        return device.lend(aligned(WINDOW_BYTES))
    finally:
        device.close()


def fio_version() -> str | None:
    """None where fio is not installed."""
    if shutil.which("fio") is None:
        return None
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, timeout=10).stdout.strip() or None


def fio(files: Files, *, is_write: bool, queue_depth: int, limit_s: float | None = None) -> Cost:
    """The yardstick: fio's io_uring with registered buffers and files, one thread, O_DIRECT. Its CPU time is what its
    job says of itself, without fio's own start. Raises HCacheError."""
    options = {
        "name": "yardstick",
        "ioengine": "io_uring",
        "fixedbufs": 1,
        "registerfiles": 1,
        "nonvectored": 1,
        "direct": 1,
        "rw": "write" if is_write else "read",
        "bs": files.chunk_bytes,
        "iodepth": queue_depth,
        "filename": ":".join(str(path).replace(":", "\\:") for path in files.paths),
        "overwrite": 1,
        "fallocate": "none",
        "file_service_type": "roundrobin:1",
        "filesize": files.num_chunks_per_file * files.chunk_bytes,
        "output-format": "json",
    }
    if limit_s is not None:
        options["runtime"] = f"{max(10, round(1e3 * limit_s))}ms"
    command = ["fio", *(f"--{name}={value}" for name, value in options.items())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=FIO_TIMEOUT_S)
        (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise HCacheError(f"fio failed: {said[-1] if said else error}") from error
    side = job["write" if is_write else "read"]
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    return Cost(num_bytes=side["io_bytes"], wall_s=max(side["runtime"], 1) / 1e3, cpu_s=cpu_s)


def uring(
    files: Files,
    *,
    is_write: bool,
    queue_depth: int,
    lent: bool = True,
    checksums: bool = False,
    limit_s: float | None = None,
) -> Cost:
    """The native engine, O_DIRECT, in registered memory if `lent` (HCacheError when too little may be locked). Moves
    all bytes once, or as many as it can in `limit_s`, over and over."""
    batch_size = max(1, min(max(2 * queue_depth, 16), WINDOW_BYTES // 2 // files.chunk_bytes))
    window = aligned(2 * batch_size * files.chunk_bytes, 7)
    chunks = [window[idx * files.chunk_bytes : (idx + 1) * files.chunk_bytes] for idx in range(2 * batch_size)]
    num_chunks = files.num_bytes // files.chunk_bytes

    def work() -> int:
        flying: list[tuple[_io.Batch, list[memoryview]]] = []
        stop_s = None if limit_s is None else time.perf_counter() + limit_s
        num_done = 0

        def land() -> None:
            batch, own = flying.pop(0)
            _check(batch, files.chunk_bytes)
            if checksums and not is_write:
                for chunk in own:
                    crc32c(chunk)

        while num_done < num_chunks if stop_s is None else time.perf_counter() < stop_s:
            if len(flying) == 2:
                land()  # one half of the window flies while the other is refilled
            part = range(num_done, num_done + batch_size if stop_s else min(num_done + batch_size, num_chunks))
            half = num_done // batch_size % 2 * batch_size
            own = chunks[half : half + len(part)]
            if checksums and is_write:
                for chunk in own:
                    crc32c(chunk)
            places = [files.place(idx) for idx in part]
            requests = [
                (is_write, opened[file_idx], offset, chunk)
                for (file_idx, offset), chunk in zip(places, own, strict=True)
            ]
            flying.append((device.submit(requests), own))
            num_done += len(part)
        while flying:
            land()
        return num_done * files.chunk_bytes

    with ExitStack() as stack:
        device = new_device(queue_depth)
        stack.callback(device.close)
        if lent and not device.lend(window):
            raise HCacheError(f"{len(window)} bytes of memory may not be registered; raise `ulimit -l`")
        opened: list[_io.File] = []
        for fd in stack.enter_context(_open(files)):
            opened.append(device.open(fd))
            stack.callback(opened[-1].close)
        return measured(work)


def threads(
    files: Files,
    *,
    is_write: bool,
    queue_depth: int,
    checksums: bool = False,
    limit_s: float | None = None,
) -> Cost:
    """What the `threads` backend does, by `queue_depth` threads: through the page cache. Reads find none of the files
    in it; writes end with fdatasync, which counts. Moves every byte at most once, so that nothing is met again in the
    page cache.

    Runs twice, and the second time counts. A virtual machine may have lent its free memory to the host and gets it back
    page by page, when the page cache first touches it: by far the dearest part of a copy into it (2.3 CPU seconds per
    GB were seen, 0.2 without), and nothing that a backend can do about. Pages that were used a moment ago are there.
    """
    num_chunks = files.num_bytes // files.chunk_bytes
    window = aligned(queue_depth * files.chunk_bytes, 7)

    def lane(own: memoryview, stop_s: float | None) -> int:
        num_done = 0
        while stop_s is None or time.perf_counter() < stop_s:
            idx = next(numbers)
            if idx >= num_chunks:
                break
            file_idx, offset = files.place(idx)
            if is_write:
                if checksums:
                    crc32c(own)
                write_all(fds[file_idx], [own], offset)
            else:
                if not read_all(fds[file_idx], [own], offset):
                    raise HCacheError("a scratch file ends early")
                if checksums:
                    crc32c(own)
            num_done += 1
        return num_done

    def work() -> int:
        stop_s = None if limit_s is None else time.perf_counter() + limit_s / 2
        starts = range(0, len(window), files.chunk_bytes)
        lanes = [pool.submit(lane, window[start : start + files.chunk_bytes], stop_s) for start in starts]
        num_done = sum(one.result() for one in lanes)
        if is_write:
            for fd in fds:
                os.fdatasync(fd)
        return max(1, num_done) * files.chunk_bytes

    drop_pages(files.paths)
    with _open(files) as fds, ThreadPoolExecutor(queue_depth) as pool:
        numbers = count()
        work()
        drop_pages(files.paths)
        numbers = count()
        cost = measured(work)
    drop_pages(files.paths)
    return cost


@contextmanager
def _open(files: Files) -> Iterator[list[int]]:
    with ExitStack() as stack:
        fds = []
        for path in files.paths:
            fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            stack.callback(os.close, fds[-1])
        yield fds


def _check(batch: _io.Batch, chunk_bytes: int) -> None:
    wrong = [result for result in batch.wait_all() if result != chunk_bytes]
    batch.close()
    if wrong:
        raise HCacheError(f"{len(wrong)} transfers failed, first as {wrong[0]}")
