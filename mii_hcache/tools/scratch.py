"""A private place for files that nobody needs afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mii_hcache.errors import ConfigError
from mii_hcache.storage.state_dir import make_private_dir
from mii_hcache.tools.table import size

PREFIX = ".scratch-"
_SPARE_BYTES = 64 << 20
"""Of a disk, left to others."""


@contextmanager
def scratch(directory: Path, num_bytes: int) -> Iterator[Path]:
    """A new folder (0700) in `directory`, which is made if it is not there. All is as before after the block: also
    after an exception, Ctrl-C or SIGTERM. What a killed process left is removed at the next time.

    Raises ConfigError when the directory cannot be used or has no room for `num_bytes`.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        if made:
            check_room(directory, num_bytes)
            make_private_dir(directory)
        sweep(directory)
        check_room(directory, num_bytes)
        folder, lock = _new_folder(directory)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be used ({error})") from error
    try:
        with _ended_by_sigterm():
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def check_room(directory: Path, num_bytes: int) -> None:
    """Raise ConfigError unless `directory`, or the nearest one above it that exists, has room for scratch files."""
    standing = directory.absolute()
    while not standing.exists() and standing != standing.parent:
        standing = standing.parent
    if not standing.is_dir():
        raise ConfigError(f"{standing} is a file; give a directory")
    free_bytes = shutil.disk_usage(standing).free
    if free_bytes < num_bytes + _SPARE_BYTES:
        raise ConfigError(
            f"{standing} has {size(free_bytes)} free, {size(num_bytes + _SPARE_BYTES)} are wanted; give a smaller "
            "--bytes or another directory"
        )


def leftovers(directory: Path) -> list[Path]:
    """Scratch folders in a directory whose owners are gone."""
    found = []
    for folder in sorted(directory.glob(PREFIX + "*")):
        try:
            lock = _locked(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except PermissionError:  # another user's, in a directory that several share
            continue
        if lock is not None:
            os.close(lock)
            found.append(folder)
    return found


def sweep(directory: Path) -> None:
    """Remove `leftovers`."""
    for folder in leftovers(directory):
        lock = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:  # held until it is gone: one that was made a moment ago may be about to be locked
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _new_folder(directory: Path) -> tuple[Path, int]:
    """And the lock on it, which keeps others from sweeping it away. Who sweeps may come before that."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
        lock = _locked(folder, fcntl.LOCK_EX)
        if lock is not None:
            return folder, lock


def _locked(folder: Path, operation: int) -> int | None:
    """A folder's file descriptor, locked; None when it is not there (any more) or is locked by another."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(fd, operation)
        if folder.exists():
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return None


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does. On the main thread; elsewhere signals are somebody else's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
