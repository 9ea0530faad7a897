"""Which backend reads and writes segment files, and why that one."""

from __future__ import annotations

import logging
from functools import lru_cache

from mii_hcache.errors import ConfigError
from mii_hcache.storage.disk_io import DiskIO, ThreadsIO
from mii_hcache.storage.native import how_cufile_moves_bytes, why_no_cufile, why_no_uring

_log = logging.getLogger(__name__)

IO_BACKENDS = ("auto", "uring", "threads", "cufile")


def open_io(wanted: str = "auto") -> tuple[DiskIO, str]:
    """A backend and why it is that one, for people. `auto` is `uring` where it works, else `threads`; `cufile` is that,
    and reads into GPUs besides. The format is the same. Raises ConfigError for a backend that cannot be had."""
    name, reason = choose_io(wanted)
    if name == "cufile":
        from mii_hcache.storage.cufile import CufileIO

        return CufileIO(open_io("auto")[0]), reason
    if name == "uring":
        from mii_hcache.storage.uring import UringIO

        try:
            return UringIO(), reason
        except OSError as error:  # such as no memory left to lock
            if wanted != "auto":
                raise ConfigError(f"io: uring cannot be opened ({error}); choose auto or threads") from error
            reason = f"io_uring cannot be opened ({error})"
            _log.warning("segment files are read and written by threads: %s", reason)
    return ThreadsIO(), reason


def choose_io(wanted: str) -> tuple[str, str]:
    """Name of the backend that `wanted` means here, and why it is that one. Raises ConfigError."""
    if wanted not in IO_BACKENDS:
        raise ConfigError(f"io must be one of {', '.join(IO_BACKENDS)}, got {wanted!r}")
    if wanted == "threads":
        return wanted, "asked for"
    if wanted == "cufile":
        why_not = why_no_cufile()
        if why_not is not None:
            raise ConfigError(f"io: cufile cannot be had, {why_not}; choose auto, uring or threads")
        how = f"{how_cufile_moves_bytes()}; experimental: its authors never ran it on a GPU"
        return wanted, f"asked for; {how}; host memory by {choose_io('auto')[0]}"
    why_not = why_no_uring()
    if why_not is None:
        return "uring", "asked for" if wanted == "uring" else "the native engine is built and io_uring works here"
    if wanted == "uring":
        raise ConfigError(f"io: uring cannot be had, {why_not}; choose auto or threads")
    _tell_once(why_not)
    return "threads", why_not


@lru_cache
def _tell_once(why_not: str) -> None:
    _log.info("segment files are read and written by threads: %s", why_not)
