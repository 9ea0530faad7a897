"""The same on NVIDIA's own libraries and a real GPU:

    python -m tests.storage.gpu.on_gpu FOLDER

FOLDER: on the disk that is to be read. Prints a line for each thing seen; exits with 77 and the reason where there is
no GPU or no cuFile, and with another number when anything is wrong. Its figures are for a first look, no benchmark.
"""

from __future__ import annotations

import random
import sys
import time
from contextlib import closing
from pathlib import Path

from crc32c import crc32c

from mii_hcache.storage import native
from mii_hcache.storage.cufile import open_proven
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.records import DeviceRead
from mii_hcache.storage.state_dir import StateDir
from tests.storage.storage_kit import holds, make_chunks, make_record, put, reads_of

LENGTHS = [0, 1, 63, 64, 4095, 4096, 4097, (512 << 10) - 1, 512 << 10, (512 << 10) + 1]


def checksums(cufile, address: int) -> None:
    """The kernel says what the package says, at any place and length; how fast it is."""
    for length in LENGTHS:
        for place in (0, 16, 5):
            payload = random.Random(length).randbytes(length)
            if payload:
                cufile.copy_in(address + place, payload)
            assert cufile.crc32c([(address + place, length)]) == [crc32c(payload)], (length, place)
    pieces = [(address + idx * (512 << 10), 512 << 10) for idx in range(32)]
    cufile.crc32c(pieces)
    start_s = time.perf_counter()
    for _ in range(5):
        cufile.crc32c(pieces)
    elapsed_s = (time.perf_counter() - start_s) / 5
    print(f"checksums agree; 16 MiB in {1e6 * elapsed_s:.0f} us, launch and answer included")


def chunks(cufile, address: int, folder: Path) -> None:
    """What was put arrives, by the short way and by the long one, and damage is told."""
    record = make_record("a", chunk_bytes=512 << 10, num_chunks=100)
    with closing(StateDir(folder)) as state_dir, closing(FileStore(state_dir, 1 << 30, io="cufile")) as store:
        assert put(store, record) and holds(store, record)
        print(store.io_reason)
        reader = store.device_reader(0)
        assert reader is not None, "the log says why"
        for lent, place in ((False, 5), (True, 0), (False, 0)):
            if lent:
                print(f"memory is registered: {reader.lend(address, 64 << 20)}")
            reads = [_to_device(read, address + place + idx * (512 << 10)) for idx, read in enumerate(reads_of(record))]
            start_s = time.perf_counter()
            outcome = reader.get_into(reads)
            elapsed_s = time.perf_counter() - start_s
            assert outcome.reason is None, outcome
            for read, chunk in zip(reads, make_chunks(record), strict=True):
                arrived = bytearray(read.num_bytes)
                cufile.copy_out(arrived, read.address)
                assert arrived == chunk, "wrong bytes"
            print(f"50 MiB {'in place' if place == 0 else 'by the detour'}: {52.4e-3 / elapsed_s:.2f} GB/s")
            if lent:
                reader.take_back(address, 64 << 20)
        _, offset = store._segments.where(store._index._spans[record.span_id].places[50])
        (path,) = state_dir.segments.glob("*.seg")
        with open(path, "r+b") as file:
            file.seek(offset + 1000)
            byte = file.read(1)[0]
            file.seek(offset + 1000)
            file.write(bytes([byte ^ 1]))
        outcome = reader.get_into(reads)
        assert (outcome.num_ok, outcome.reason) == (50, "corrupt"), outcome
        print("a flipped bit on the disk is corrupt")


def _to_device(read, address: int):
    return DeviceRead(
        span_id=read.span_id, layer_idx=read.layer_idx, address=address, num_bytes=read.out.nbytes, kind=read.kind
    )


def main(folder: Path) -> int:
    why_not = native.why_no_cufile()
    if why_not is not None:
        print(why_not)
        return 77
    print(native.how_cufile_moves_bytes())
    with closing(open_proven(0, folder)) as reads:
        print(f"{reads.gpu_name}: the trial read is right")
        address = reads.cufile.allocate(65 << 20)
        checksums(reads.cufile, address)
        chunks(reads.cufile, address, folder / "state")
        reads.cufile.free(address)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
