"""Proof that cuFile brings the right bytes here, before any chunk is trusted to it.

A path that goes around the CPU can be wrong without an error: a BAR that is mapped too short, a peer-to-peer route that
drops writes, a file system that cuFile takes for another one. So it is tried where the chunks will lie.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crc32c import crc32c

from mii_hcache.storage.format import BLOCK_BYTES

if TYPE_CHECKING:
    from mii_hcache import _io

WHOLE_BYTES = 1 << 20
TAIL_BYTES = 1001
"""An odd rest behind the whole blocks."""


def prove(cufile: _io.Cufile, scratch: Path) -> str | None:
    """Write a file in the directory `scratch` past cuFile, read it through cuFile into device memory, compare there and
    here. None when all is well, else what is wrong, for people. Blocks; leaves nothing behind."""
    written = os.urandom(WHOLE_BYTES + TAIL_BYTES)
    try:
        with _memory(cufile, WHOLE_BYTES + 2 * BLOCK_BYTES) as address:
            return _read_back(cufile, scratch, written, address) or _check_kernel(cufile, address)
    except OSError as error:
        return f"the trial read failed ({error})"


def _read_back(cufile: _io.Cufile, scratch: Path, written: bytes, address: int) -> str | None:
    before = bytes(byte ^ 0xFF for byte in written) + bytes(2 * BLOCK_BYTES - TAIL_BYTES)
    cufile.copy_in(address, before)  # no byte is right already
    fd, path = tempfile.mkstemp(prefix="cufile-trial-", dir=scratch)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(written)  # and not synced: chunks, too, are read before they are
        pieces = [(0, WHOLE_BYTES), (WHOLE_BYTES, TAIL_BYTES)]
        results = _read(cufile, fd, [(start, address + start, length) for start, length in pieces])
    finally:
        os.close(fd)
        os.unlink(path)
    for (_, length), result in zip(pieces, results, strict=True):
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        if result != length:
            return f"cuFile read {result} of {length} bytes of the trial file"
    arrived = bytearray(len(before))
    cufile.copy_out(arrived, address)
    if arrived[: len(written)] != written:
        num_wrong = sum(a != b for a, b in zip(arrived, written, strict=False))
        return f"cuFile brought {num_wrong} of {len(written)} bytes wrong"
    if arrived[len(written) :] != before[len(written) :]:
        return "cuFile wrote beyond the bytes that were asked for"
    on_device = cufile.crc32c([(address + start, length) for start, length in pieces])
    if on_device != [crc32c(written[start : start + length]) for start, length in pieces]:
        return "the GPU's checksums are not the CPU's"
    return None


def _check_kernel(cufile: _io.Cufile, address: int) -> str | None:
    """A checksum must see one bit."""
    block = bytearray(os.urandom(BLOCK_BYTES))
    cufile.copy_in(address, block)
    sound = cufile.crc32c([(address, BLOCK_BYTES)])
    block[BLOCK_BYTES // 3] ^= 0x04
    cufile.copy_in(address, block)
    if cufile.crc32c([(address, BLOCK_BYTES)]) == sound:
        return "the GPU's checksums miss a flipped bit"
    return None


def _read(cufile: _io.Cufile, fd: int, reads: list[tuple[int, int, int]]) -> list[int]:
    file = cufile.open(fd)
    try:
        batch = cufile.submit([(False, file, *read) for read in reads])
        try:
            return [batch.wait(idx) for idx in range(len(reads))]
        finally:
            batch.close()
    finally:
        file.close()


@contextlib.contextmanager
def _memory(cufile: _io.Cufile, num_bytes: int) -> Iterator[int]:
    """Device memory for the length of a `with` block."""
    address = cufile.allocate(num_bytes)
    try:
        yield address
    finally:
        cufile.free(address)
