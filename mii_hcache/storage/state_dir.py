"""The directory that holds saved state, and who owns it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import uuid
import weakref
from pathlib import Path

from mii_hcache.errors import ConfigError, StateDirBusyError
from mii_hcache.storage.format import UUID_BYTES

TRANSCRIPTS_FILE = "transcripts.sqlite"
PINS_FILE = "pins.sqlite"
NAMESPACE_FILE = "namespace"
"""Address of the NVMe namespace that holds the segments; without it they lie in `segments`."""
PROFILE_FILE = "profile.json"
"""What the machine measured of itself and a model (`core.cost.MeasuredProfile`)."""
_OUR_FILES = (
    *("lock", "store.id", "set.json", "segments/*.seg"),
    *("catalog*.sqlite*", "transcripts*.sqlite*", "pins*.sqlite*"),
    NAMESPACE_FILE,
)
"""What is made private on opening. Other files in the directory are none of our business."""


class StateDir:
    """A state directory, owned by this process until `close` or the process's death. Safe from any thread.

    Conversations lie here in clear, so the directory is 0700 and its files are 0600 whatever the umask says, and files
    that were opened wider are tightened. Raises StateDirBusyError while another process owns the directory, ConfigError
    when it cannot be used at all. Opening does not wait.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            make_private_dir(self.path)
            self._lock_fd = _lock(self.path)
        except OSError as error:
            raise ConfigError(f"state_dir {self.path} cannot be used ({error}); choose a directory you own") from error
        _owned.add(self)
        try:
            self._identity = _identity_of(self.path)
            make_private_dir(self.segments)
            self._tighten()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raise OSError unless the path still leads here: a disk that was unmounted leaves a folder of another one,
        which must not be written to. Blocks on I/O."""
        if _identity_of(self.path) != self._identity:
            raise OSError(errno.ENODEV, "the directory is another one than was opened", str(self.path))

    @property
    def catalog(self) -> Path:
        """The catalog's database."""
        return self.path / "catalog.sqlite"

    @property
    def transcripts(self) -> Path:
        """The transcripts' database."""
        return self.path / TRANSCRIPTS_FILE

    @property
    def pins(self) -> Path:
        """The database of pinned contexts."""
        return self.path / PINS_FILE

    @property
    def segments(self) -> Path:
        """Directory of segment files."""
        return self.path / "segments"

    def read_store_uuid(self) -> bytes | None:
        """The identity of the store here, None when there is none or it cannot be read."""
        return store_uuid_in(self.path)

    def write_store_uuid(self, store_uuid: bytes) -> None:
        """Give the store here its identity; replaces the file atomically."""
        self._replace("store.id", store_uuid.hex().encode())

    def read_namespace(self) -> str | None:
        """Address of the NVMe namespace that holds the segments, None when they lie in `segments`."""
        try:
            return (self.path / NAMESPACE_FILE).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path / 'namespace'} cannot be read ({error})") from error

    def write_namespace(self, address: str) -> None:
        """Keep the segments on a namespace from now on; replaces the file atomically."""
        self._replace(NAMESPACE_FILE, address.encode())

    def _replace(self, name: str, content: bytes) -> None:
        new = self.path / f"{name}.new"
        fd = open_private(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        new.replace(self.path / name)
        sync_dir(self.path)

    def close(self) -> None:
        """Let another process have the directory. Idempotent."""
        if self._lock_fd >= 0:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)  # for children too that were forked a moment ago
        self._disown()

    def _disown(self) -> None:
        """Drop this process's hold on the lock, without unlocking it for a parent that has it too."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def _tighten(self) -> None:
        for pattern in _OUR_FILES:
            for file in self.path.glob(pattern):
                if stat.S_ISREG(file.lstat().st_mode):
                    file.chmod(0o600)


_owned: weakref.WeakSet[StateDir] = weakref.WeakSet()


def _disown_all() -> None:
    for state_dir in list(_owned):
        state_dir._disown()


os.register_at_fork(after_in_child=_disown_all)  # or a forked child would keep the lock of a parent that died


def store_uuid_in(path: Path) -> bytes | None:
    """The identity of the store in a state directory that this process need not own, None when there is none or it
    cannot be read."""
    try:
        raw = bytes.fromhex((path / "store.id").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return raw if len(raw) == UUID_BYTES else None


def owner_of(path: Path) -> str | None:
    """Process id of whoever owns a state directory now, `unknown` if it cannot be read, None for nobody. Owners are not
    disturbed; a server that starts in the very microsecond of the question is refused, and can be started again."""
    try:
        fd = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(fd)
    finally:
        os.close(fd)
    return None


def refuse_busy(path: Path) -> None:
    """Raise StateDirBusyError while a process owns the directory, which `StateDir` does, too, but later. What else may
    be wrong with it is not looked at."""
    with contextlib.suppress(OSError):
        owner = owner_of(path)
        if owner is not None:
            raise _busy(path, owner)


def new_store_uuid() -> bytes:
    """An identity that no other store has."""
    return uuid.uuid4().bytes


def open_private(path: Path, flags: int) -> int:
    """Open a file of ours: mode 0600 whatever the umask, not inherited by children. Returns the descriptor."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if flags & os.O_CREAT:
            os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sync_dir(path: Path) -> None:
    """Make creations, renames and removals in a directory durable. Blocks on I/O."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_private_dir(path: Path) -> None:
    """Make a directory that only its owner may enter, or tighten one that is there. Raises OSError."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    for directory in missing:  # or a power cut takes the directory, with all that was flushed in it
        with contextlib.suppress(PermissionError):  # a parent that may not be read
            sync_dir(directory.parent)


def _identity_of(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _lock(path: Path) -> int:
    fd = open_private(path / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(fd)
        os.close(fd)
        raise _busy(path, owner) from None
    except BaseException:
        os.close(fd)
        raise
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd


def _busy(path: Path, owner: str) -> StateDirBusyError:
    return StateDirBusyError(
        f"state directory {path} is in use by process {owner}; stop that server, or give this one a directory of its "
        "own"
    )


def _owner(fd: int) -> str:
    """The process id in a lock file. Its owner may have locked it a moment ago and not written it yet."""
    for _ in range(20):
        with contextlib.suppress(ValueError):
            return str(int(os.pread(fd, 32, 0)))
        time.sleep(0.01)
    return "unknown"
