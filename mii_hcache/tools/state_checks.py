"""Can a server keep its state here?"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from mii_hcache.config import HCacheConfig
from mii_hcache.core.cost import MeasuredProfile
from mii_hcache.errors import ConfigError
from mii_hcache.runtime.machine import filesystem_of
from mii_hcache.storage.cufile import open_proven
from mii_hcache.storage.disk_io import ThreadsIO
from mii_hcache.storage.disk_space import disk_space_of
from mii_hcache.storage.format import BLOCK_BYTES, SegmentHeader
from mii_hcache.storage.native import how_cufile_moves_bytes, why_no_cufile
from mii_hcache.storage.open_io import choose_io
from mii_hcache.storage.segment import SegmentFile
from mii_hcache.storage.state_dir import PROFILE_FILE, owner_of
from mii_hcache.storage.stripe_set import StripeSet, device_of
from mii_hcache.tools.findings import Check, Finding, off, ok, problem
from mii_hcache.tools.table import size


def state_checks(directories: Sequence[Path]) -> list[tuple[str, Check]]:
    """In the order in which they should be told."""
    if len(directories) == 1:
        directory, checks = directories[0], []
    else:
        try:
            stripes = StripeSet.of([one.absolute() for one in directories])
        except ConfigError as error:
            message = str(error)
            return [("stripes", lambda: problem("stripes", message, "see what is said there", prevents_serving=True))]
        directory = stripes.seats[0].path
        checks = [("stripes", partial(_stripes, stripes))]
        for seat in stripes.seats[1:]:
            if seat.why_missing is None:
                number = seat.ordinal + 1
                checks += [
                    _named(f"state directory {number}", partial(_directory, seat.path)),
                    _named(f"disk {number}", partial(_disk, seat.path, len(directories))),
                ]
        if stripes.seats[0].why_missing is not None:
            return [*checks, ("I/O", _io)]
    return [
        ("state directory", partial(_directory, directory)),
        ("disk", partial(_disk, directory, len(directories))),
        *checks,
        ("I/O", _io),
        ("O_DIRECT", partial(_direct, directory)),
        ("cuFile", partial(_cufile, directory)),
        ("hole punching", partial(_punching, directory)),
        ("profile", partial(_profile, directory)),
    ]


def _named(name: str, check: Check) -> tuple[str, Check]:
    return name, lambda: replace(check(), name=name)


def _stripes(stripes: StripeSet) -> Finding:
    """Are all directories of a set there, each on a disk of its own?"""
    missing = [f"{seat.path}: {seat.why_missing}" for seat in stripes.seats if seat.why_missing is not None]
    if missing or stripes.notes:
        advice = "mount it, or mend what is said; a server does without it until then, and notices its return"
        return problem("stripes", "; ".join([*missing, *stripes.notes]), advice)
    num_devices = len({device_of(_standing(seat.path)) for seat in stripes.seats})
    reason = f"{len(stripes.seats)} directories on {num_devices} file system{'s' * (num_devices > 1)}"
    if num_devices < len(stripes.seats):
        return off("stripes", f"{reason}: some share a disk, which makes nothing faster")
    return ok("stripes", reason)


def _standing(directory: Path) -> Path:
    """The directory, or the nearest one above it that exists."""
    directory = directory.absolute()
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory


def _directory(directory: Path) -> Finding:
    name, choose = "state directory", "choose another --state-dir"
    standing = _standing(directory)
    if not standing.is_dir():
        return problem(name, f"{standing} is a file", choose, prevents_serving=True)
    try:
        with _probe(standing):
            pass
    except OSError as error:
        return problem(name, f"{standing} cannot be written ({error.strerror})", choose, prevents_serving=True)
    if standing != directory.absolute():
        return ok(name, f"{directory} does not exist yet; a server makes it")
    if os.geteuid() not in (0, directory.stat().st_uid):
        return problem(name, f"{directory} belongs to another user", choose, prevents_serving=True)
    owner = owner_of(directory)
    if owner is not None:
        reason = f"{directory} is in use by the server with process id {owner}"
        return ok(name, reason, "a second server needs a --state-dir of its own")
    return ok(name, f"{directory}, not in use")


def _disk(directory: Path, num_shares: int = 1) -> Finding:
    standing = _standing(directory)
    kind, space, capacity = filesystem_of(standing), disk_space_of(standing), _share_bytes(num_shares)
    if standing != directory.absolute():
        space = replace(space, held_bytes=0)  # what lies there is not this directory's
    reason = (
        f"{kind}, {size(space.free_bytes)} of {size(space.total_bytes)} free, {size(space.held_bytes)} taken by saved "
        "state"
    )
    if kind in ("tmpfs", "ramfs"):
        return problem(
            "disk", f"{reason}; all of it is memory", "choose a --state-dir on a disk: this one survives nothing"
        )
    if space.usable_bytes < capacity:
        reason += f"; a server takes up to {size(capacity)}"
        return problem("disk", reason, "take a smaller --state-capacity, or another --state-dir")
    return ok("disk", reason)


def _share_bytes(num_shares: int) -> int:
    return HCacheConfig().state_capacity_bytes // num_shares


def _direct(directory: Path) -> Finding:
    try:
        with _probe(_standing(directory)) as path:
            fd = os.open(path, os.O_RDWR | os.O_DIRECT)
            try:
                os.pwrite(fd, mmap.mmap(-1, BLOCK_BYTES), 0)
            finally:
                os.close(fd)
    except OSError as error:
        return off("O_DIRECT", f"the file system refuses it ({error.strerror}): I/O goes through the page cache")
    return ok("O_DIRECT", "the file system takes it; --io uring goes around the page cache")


def _io() -> Finding:
    """Which backend a server here would use, and why."""
    try:
        name, reason = choose_io(HCacheConfig().io)
    except ConfigError as error:
        return problem("I/O", str(error), "unset MII_HCACHE_IO, or set it to auto", prevents_serving=True)
    if name == "threads":
        return off("I/O", f"threads: {reason}")
    return ok("I/O", f"{name}: {reason}")


def _cufile(directory: Path) -> Finding:
    """Whether chunks could go from the disk to the first GPU past the CPU, tried where they would lie."""
    untried = "experimental: never run on a GPU"
    why_not = why_no_cufile()
    if why_not is not None:
        return off("cuFile", f"{why_not}; state reaches a GPU through host memory")
    try:
        with closing(open_proven(0, _standing(directory))) as reads:
            reason = f"{reads.gpu_name}: {how_cufile_moves_bytes()}; a trial read was right; {untried}"
    except OSError as error:
        return off("cuFile", f"there, but not to be used ({error}); {untried}")
    return ok("cuFile", reason, "--io cufile")


def _punching(directory: Path) -> Finding:
    header = SegmentHeader(store_uuid=bytes(16), slot_bytes=2 * BLOCK_BYTES, num_slots=1)
    try:
        with _probe(_standing(directory)) as path:
            os.truncate(path, 4 * BLOCK_BYTES)
            io = ThreadsIO()
            with closing(SegmentFile(path, header, io, io.open(os.open(path, os.O_RDWR)))) as file:
                works = file.punch(0)
    except OSError as error:
        return off("hole punching", f"could not be tried ({error.strerror})")
    if works:
        return ok("hole punching", "bytes of deleted conversations leave the disk at once")
    reason = "the file system cannot: deleted conversations stay on the disk until their place is used again"
    return off("hole punching", reason, "choose a --state-dir on ext4, XFS or Btrfs if that matters")


def _profile(directory: Path) -> Finding:
    """What plans are made of."""
    advice = "python -m mii_hcache profile"
    try:
        profile = MeasuredProfile.from_json((directory / PROFILE_FILE).read_text())
    except FileNotFoundError:
        return off("profile", "this machine is not measured yet; a server does it when it first starts", advice)
    except (OSError, ValueError, ConfigError) as error:
        return problem("profile", f"{directory / PROFILE_FILE} cannot be used ({error})", advice)
    costs = [
        f"{tier}: read {1e6 * cost.io_hidden_s:.2f} us a hidden row and {1e6 * cost.io_kv_s:.2f} a kv row"
        for tier, cost in profile.tiers.items()
    ]
    first = next(iter(profile.tiers.values()))
    computing = f"project {1e6 * first.c_hidden_s:.2f} us, compute {1e6 * first.c_token_s:.2f} us a token and layer"
    if profile.h2d_bytes_per_s:
        computing += f", copy to the GPU {profile.h2d_bytes_per_s / 1e9:.1f} GB/s"
    if profile.is_doubtful:
        reason = (
            f"the machine was busy when it was measured: the same work took up to {profile.spread:.1f} times as long"
        )
        return problem("profile", reason, f"{advice}, when nothing else runs")
    return ok("profile", f"measured {profile.date[:10]} on {profile.machine}; {'; '.join(costs)}; {computing}")


@contextmanager
def _probe(directory: Path) -> Iterator[Path]:
    """A file of ours for a moment, to try things on. Raises OSError."""
    fd, name = tempfile.mkstemp(prefix=".hcache-probe-", dir=directory)
    os.close(fd)
    try:
        yield Path(name)
    finally:
        os.unlink(name)
