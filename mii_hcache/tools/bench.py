"""`python -m mii_hcache bench`: how fast this machine is at what a server does."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from typing import Any

from mii_hcache import __version__
from mii_hcache.config import IO_NAMES
from mii_hcache.core.amounts import parse_size
from mii_hcache.errors import ConfigError
from mii_hcache.runtime.machine import cpu_name, num_usable_cpus
from mii_hcache.storage.copying import shared_copying
from mii_hcache.storage.native import why_no_uring
from mii_hcache.tools.device_passes import WINDOW_BYTES, fio_version, may_register
from mii_hcache.tools.directories import add_state_dir, chosen_dirs
from mii_hcache.tools.progress import Progress
from mii_hcache.tools.scratch import check_room
from mii_hcache.tools.storage_bench import Bench, Row, Wanted
from mii_hcache.tools.table import size, table

_CHUNK_SIZES = (16 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20)
_QUEUE_DEPTHS = (1, 8, 32)
_MEMORY_SHARE = 0.1
_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 4096, WINDOW_BYTES // 4
_DESCRIPTION = "Measures this machine at what a server does. Changes no saved state."
_EXAMPLES = """\
examples:
  python -m mii_hcache bench storage --state-dir /nvme/state
  python -m mii_hcache bench storage --help
"""
_STORAGE_DESCRIPTION = """\
Reads and writes scratch files in a state directory's file system, by each way that a server may do it (--io), and says
for each: GB/s, chunks a second, and CPU seconds per GB (user and system, of the whole process). Beside them stand what
fio reaches on the same files, where it is installed (io_uring, registered memory and files, O_DIRECT; the best of the
queue depths), what a whole store makes of it, what checksums cost, and the DRAM tier beside plain memcpy.

Rows are medians of passes that take turns, so that whatever else the machine does meets all of them. On a disk that is
rate-limited, as on rented machines, all ways are equally fast: there CPU seconds per GB are the result.

The page cache is not measured: uring and fio go around it (O_DIRECT); for threads, which go through it, the files are
dropped from it before each pass (fsync, then posix_fadvise), a pass reads no byte twice, and a write's time and CPU
include fdatasync at its end.

Saved state is not touched. The scratch files lie in a private folder below the state directory and are removed at the
end, also after Ctrl-C. A server that runs meanwhile makes the numbers worse, and they its answers slower.
"""
_STORAGE_EXAMPLES = """\
examples:
  python -m mii_hcache bench storage
      the directory that a server takes without --state-dir, in about a minute
  python -m mii_hcache bench storage --state-dir /nvme0/state --state-dir /nvme1/state --json > disks.json
      one after the other, for a script
  python -m mii_hcache bench storage --state-dir /nvme/state --chunk-bytes 512K --queue-depth 32 --seconds 300
      one shape, measured well

exit status: 0 measured, 2 not (one line says why)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """0. Raises HCacheError."""
    options = _parser().parse_args(arguments)
    return _storage(options)


def _storage(options: argparse.Namespace) -> int:
    directories = chosen_dirs(options.state_dir)
    wanted, notes = _wanted(options)
    for directory in directories:
        check_room(directory, wanted.disk_bytes)  # before anybody waited
    progress = Progress()
    bench = Bench(wanted=wanted, progress=lambda done, all_: progress.count("passes", done, all_))
    report: dict[str, Any] = {
        "version": __version__,
        "machine": {"cpu": cpu_name(), "cores": num_usable_cpus(), "kernel": platform.release()},
        "fio": fio_version() if wanted.with_fio else None,
        "kind": "measured",
        "num_bytes": wanted.num_bytes,
        "notes": notes,
        "state_dirs": [],
    }
    try:
        memory = bench.memory(_MEMORY_SHARE * options.seconds)
        for directory in directories:
            seconds = (1 - _MEMORY_SHARE) * options.seconds / len(directories)
            report["state_dirs"].append(bench.directory(directory, seconds))
    finally:
        progress.clear()
    notes += [
        f"the file system of {found['state_dir']} has no direct I/O: numbers of uring are the page cache's, and fio "
        "was left out"
        for found in report["state_dirs"]
        if not found["direct"]
    ]
    if options.json:
        for found in report["state_dirs"]:
            found["rows"] = [row.to_dict() for row in found["rows"]]
        print(json.dumps({**report, "memory": [row.to_dict() for row in memory]}, indent=2))
    else:
        print("\n".join(_lines(report, memory)))
    return 0


def _wanted(options: argparse.Namespace) -> tuple[Wanted, list[str]]:
    """What to measure, and sentences about what cannot be. Raises ConfigError."""
    notes = []
    backends = ["uring", "threads"] if options.io == "auto" else [options.io]
    why_not = why_no_uring()
    if "uring" in backends and why_not is not None:
        if options.io == "uring":
            raise ConfigError(f"--io uring cannot be had: {why_not}")
        backends.remove("uring")
        notes.append(f"uring was not measured: {why_not}")
    elif "uring" in backends and not may_register():
        notes.append("memory could not be registered with the ring (`ulimit -l`): uring costs more CPU than it could")
    if not shared_copying().is_native:
        notes.append("copies in DRAM are Python's, one at a time: the native engine was not built")
    with_fio = options.fio and fio_version() is not None
    if options.fio and not with_fio:
        notes.append("fio is not installed: there is no yardstick")
    sizes = sorted(set(options.chunk_bytes or _CHUNK_SIZES))
    for chunk_bytes in sizes:
        if chunk_bytes % 4096 or not _LEAST_CHUNK_BYTES <= chunk_bytes <= _MOST_CHUNK_BYTES:
            raise ConfigError(f"--chunk-bytes must be multiples of 4096 up to {size(_MOST_CHUNK_BYTES)}")
    depths = sorted(set(options.queue_depth or _QUEUE_DEPTHS))
    if not all(1 <= depth <= 1024 for depth in depths):
        raise ConfigError("--queue-depth must be between 1 and 1024")
    if options.seconds <= 0 or options.repeats < 1:
        raise ConfigError("--seconds must be > 0, --repeats at least 1")
    num_bytes = options.bytes // (2 * sizes[-1]) * (2 * sizes[-1])
    if num_bytes < 2 * sizes[-1]:
        raise ConfigError(f"--bytes must be at least {size(2 * sizes[-1])}: two files of one chunk")
    wanted = Wanted(
        backends=backends,
        chunk_sizes=sizes,
        queue_depths=depths,
        num_bytes=num_bytes,
        seconds=options.seconds,
        repeats=options.repeats,
        with_fio=with_fio,
    )
    return wanted, notes


def _lines(report: dict[str, Any], memory: Sequence[Row]) -> list[str]:
    machine = report["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}; {report['fio'] or 'without fio'}"]
    for found in report["state_dirs"]:
        where = f"{found['state_dir']} ({found['filesystem']}), {size(report['num_bytes'])} of scratch files"
        lines += ["", where, "", _device_table(found["rows"]), "", _other_table(found["rows"])]
    lines += ["", "memory", "", _other_table(memory)]
    everything = [row for found in report["state_dirs"] for row in found["rows"]] + list(memory)
    notes = list(report["notes"])
    spread = max(row.median.spread for row in everything)
    if spread > 2:
        notes.append(f"the same pass took up to {spread:.1f} times as long: the machine or its disk was busy")
    return [*lines, *(["", *(f"note  {note}" for note in notes)] if notes else [])]


def _device_table(rows: Sequence[Row]) -> str:
    """Payloads, beside fio's best of the same chunk size."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row.point.side, row.point.chunk_bytes)
        if row.point.backend == "fio" and (key not in best or row.median.gb_per_s > best[key].median.gb_per_s):
            best[key] = row
    cells = []
    for row in rows:
        point, median = row.point, row.median
        if point.what != "device":
            continue
        fio = best.get((point.side, point.chunk_bytes))
        beside = ["-", "-"]
        if fio is not None and point.backend != "fio":
            fio_cpu = fio.median.cpu_s_per_gb  # in whole percents of its time: 0 of a short pass says nothing
            beside = [
                f"{100 * median.gb_per_s / fio.median.gb_per_s:.0f} %",
                f"{median.cpu_s_per_gb / fio_cpu:.2f}x" if fio_cpu > 0 else "-",
            ]
        cells.append(
            [
                point.side,
                size(point.chunk_bytes),
                point.backend + (" + checksums" if point.checksums else ""),
                str(point.queue_depth),
                *_numbers(row),
                *beside,
            ]
        )
    header = ["", "chunk", "by", "depth", "GB/s", "chunks/s", "CPU s/GB", "of fio's best", "CPU of fio's", "passes"]
    return table(header, [[*cell[:7], *cell[8:], cell[7]] for cell in cells], left=3)


def _other_table(rows: Sequence[Row]) -> str:
    """Stores, copies, checksums."""
    names = {
        "store": "whole store, checksums and catalog included",
        "copy": "copies in memory",
        "checksum": "checksums alone",
    }
    cells = [
        [
            names[row.point.what],
            row.point.side,
            row.point.backend,
            "-" if row.point.queue_depth is None else str(row.point.queue_depth),
            *_numbers(row),
        ]
        for row in rows
        if row.point.what in names
    ]
    return table(["", "", "by", "threads", "GB/s", "chunks/s", "CPU s/GB", "passes"], cells, left=3)


def _numbers(row: Row) -> list[str]:
    median = row.median
    return [f"{median.gb_per_s:.2f}", f"{row.iops:,.0f}", f"{median.cpu_s_per_gb:.3f}", str(median.passes)]


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m mii_hcache bench",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=form,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds")
    storage = kinds.add_parser(
        "storage",
        help="reading and writing saved state: disks, checksums, memory",
        description=_STORAGE_DESCRIPTION,
        epilog=_STORAGE_EXAMPLES,
        formatter_class=form,
        allow_abbrev=False,
    )
    add_state_dir(storage, "on the disk to measure")
    storage.add_argument(
        "--bytes", type=parse_size, default="512MiB", metavar="SIZE", help="of scratch files (default: %(default)s)"
    )
    storage.add_argument(
        "--seconds", type=float, default=60.0, metavar="N", help="for everything, about (default: %(default)g)"
    )
    storage.add_argument(
        "--chunk-bytes",
        type=parse_size,
        nargs="+",
        metavar="SIZE",
        help="chunks to move at a time (default: 16K 64K 256K 512K 1M)",
    )
    storage.add_argument(
        "--queue-depth",
        type=int,
        nargs="+",
        metavar="N",
        help="requests in flight, or threads; chunk sizes are measured with the largest (default: 1 8 32)",
    )
    storage.add_argument(
        "--io", choices=IO_NAMES, default="auto", help="one backend only (default: all that work here)"
    )
    storage.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="passes of each row, if time allows (default: %(default)s)"
    )
    storage.add_argument("--no-fio", dest="fio", action="store_false", help="leave the yardstick out")
    storage.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser
