"""What the storage engine costs beside fio on the same files, in one run:

    python -m experiments.storage_io.run --dir /fast/disk --out storage_io.jsonl

Rows are JSON, one a pass, medians last. A disk that is rate-limited, as on rented machines, makes all equally fast:
there CPU seconds per GB are the result. Verification is in the rows of stores and not in those of the engine;
`checksum` says what it costs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.common.machine import machine
from experiments.storage_io import passes

Row = dict[str, Any]


def passes_of_a_round(
    folder: Path, files: list[Path], file_bytes: int, chunk_bytes: int, *, with_stores: bool, num_paths: int
) -> Iterator[tuple[str, Any]]:
    """Name and cost of each pass; a yardstick stands next to what it measures."""
    num_bytes = len(files) * file_bytes
    for side in ("read", "write"):
        is_write = side == "write"
        for _ in range(3):  # in turn: a minute later the disk may be another
            yield f"{side} fio, registered", passes.fio(files, file_bytes, chunk_bytes, is_write=is_write)
            cost = passes.engine(files, file_bytes, chunk_bytes, is_write=is_write, lent=True)
            yield f"{side} engine, registered memory", cost
        cost = passes.engine(files, file_bytes, chunk_bytes, is_write=is_write, lent=False)
        yield f"{side} engine, unregistered memory", cost
    if with_stores:
        for io in ("uring", "threads"):
            for count in sorted({1, num_paths}):
                folders = [folder / f"state{idx}" for idx in range(count)]
                name = f"store, {io}, checksums included" + f", striped over {count}" * (count > 1)
                written, read = passes.store(folders, num_bytes, chunk_bytes, io)
                yield f"write {name}", written
                yield f"read {name}", read
    yield "checksum", passes.checksum(num_bytes, chunk_bytes)
    num_threads = os.cpu_count() or 1
    for count in sorted({1, num_threads}):
        yield f"memcpy, {count} threads", passes.memcpy(4 * num_bytes, count)
        yield f"dram engine, {count} threads", passes.dram(4 * num_bytes, chunk_bytes, count)


def filesystem_of(folder: Path) -> str:
    """Type of the file system, by the longest mount point that `folder` is under."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if folder.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("."), help="where the files are made (and removed)")
    parser.add_argument("--out", type=Path, help="also write rows to this file")
    parser.add_argument("--mib", type=int, default=1024, help="MiB of each pass, over two files (default: %(default)s)")
    parser.add_argument("--chunk-kib", type=int, default=512)
    parser.add_argument(
        "--paths",
        type=int,
        default=1,
        help="also stores striped over so many directories, next to those in one: on one disk the stripe should cost "
        "nothing",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-stores", action="store_true", help="only the engine and the yardsticks")
    values = parser.parse_args()
    chunk_bytes = values.chunk_kib << 10
    file_bytes = (values.mib << 20) // 2 // chunk_bytes * chunk_bytes
    about = machine() | {
        "kernel": platform.release(),
        "file_system": filesystem_of(values.dir),
        "chunk_bytes": chunk_bytes,
        "queue_depth": passes.QUEUE_DEPTH,
        "kind": "measured",
    }
    print(json.dumps(about), flush=True)
    lines: list[str] = []
    costs: dict[str, list[Row]] = defaultdict(list)
    folder = Path(tempfile.mkdtemp(prefix="storage-io-", dir=values.dir))
    try:
        files = [folder / "a", folder / "b"]
        block = os.urandom(1 << 20)
        for path in files:
            with path.open("wb") as file:
                for _ in range(-(-file_bytes // len(block))):
                    file.write(block)
                os.fsync(file.fileno())
        for round_idx in range(values.rounds):
            for name, cost in passes_of_a_round(
                folder, files, file_bytes, chunk_bytes, with_stores=not values.without_stores, num_paths=values.paths
            ):
                if cost is None:
                    continue
                costs[name].append(cost.row())
                row = {"pass": name, "round": round_idx, **costs[name][-1]}
                print(json.dumps(row), flush=True)
                lines.append(json.dumps(about | row))
    finally:
        shutil.rmtree(folder)
    for name, rows in costs.items():
        median = {key: statistics.median(row[key] for row in rows) for key in ("gb_per_s", "cpu_s_per_gb")}
        row = {"median": name, "passes": len(rows), **median}
        print(json.dumps(row))
        lines.append(json.dumps(about | row))
    if values.out:
        values.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
