"""What the storage engine costs beside fio on the same files, in one run:

    python -m experiments.storage_io.run --dir /fast/disk --out storage_io.jsonl

Rows are JSON, one a pass, medians last. A disk that is rate-limited, as on rented machines, makes all equally fast:
there CPU seconds per GB are the result. Verification is in the rows of stores and not in those of the engine;
`checksum` says what it costs alone. What a pass is lies in `mii_hcache/tools/*_passes.py`, which `python -m mii_hcache
bench storage` runs, too: that is the tool, and this the record.
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
from mii_hcache.runtime.machine import filesystem_of
from mii_hcache.tools import device_passes, dram_passes, store_passes
from mii_hcache.tools.device_passes import Files, make_files

QUEUE_DEPTH = 32
Row = dict[str, Any]


def passes_of_a_round(folder: Path, files: Files, *, with_stores: bool, num_paths: int) -> Iterator[tuple[str, Any]]:
    """Name and cost of each pass; a yardstick stands next to what it measures."""
    num_bytes, chunk_bytes = files.num_bytes, files.chunk_bytes
    with_fio = device_passes.fio_version() is not None
    for side in ("read", "write"):
        is_write = side == "write"
        for _ in range(3):  # in turn: a minute later the disk may be another
            if with_fio:
                cost = device_passes.fio(files, is_write=is_write, queue_depth=QUEUE_DEPTH)
                yield f"{side} fio, registered", cost
            cost = device_passes.uring(files, is_write=is_write, queue_depth=QUEUE_DEPTH)
            yield f"{side} engine, registered memory", cost
        cost = device_passes.uring(files, is_write=is_write, queue_depth=QUEUE_DEPTH, lent=False)
        yield f"{side} engine, unregistered memory", cost
    if with_stores:
        for io in ("uring", "threads"):
            for count in sorted({1, num_paths}):
                folders = [folder / f"state{idx}" for idx in range(count)]
                name = f"store, {io}, checksums included" + f", striped over {count}" * (count > 1)
                written, read = store_passes.file_store(folders, num_bytes, chunk_bytes, io)
                yield f"write {name}", written
                yield f"read {name}", read
    yield "checksum", store_passes.checksum(num_bytes, chunk_bytes)
    num_threads = os.cpu_count() or 1
    for count in sorted({1, num_threads}):
        yield f"memcpy, {count} threads", dram_passes.memcpy(4 * num_bytes, count)
        yield f"dram engine, {count} threads", dram_passes.copies(4 * num_bytes, chunk_bytes, count)


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
        "kernel": platform.release().split("-")[0],
        "file_system": filesystem_of(values.dir),
        "chunk_bytes": chunk_bytes,
        "queue_depth": QUEUE_DEPTH,
        "kind": "measured",
    }
    print(json.dumps(about), flush=True)
    lines: list[str] = []
    costs: dict[str, list[Row]] = defaultdict(list)
    folder = Path(tempfile.mkdtemp(prefix="storage-io-", dir=values.dir))
    try:
        files = Files(paths=[folder / "a", folder / "b"], file_bytes=file_bytes, chunk_bytes=chunk_bytes)
        make_files(files.paths, file_bytes)
        for round_idx in range(values.rounds):
            for name, cost in passes_of_a_round(
                folder, files, with_stores=not values.without_stores, num_paths=values.paths
            ):
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
