"""The compiled engine, where it was built: the one place that imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mii_hcache import _io

_ABI = 2
"""Of the `_io` that this package goes with."""


def why_not_built() -> str | None:
    """None when the compiled engine can be used, else why not, for people."""
    try:
        from mii_hcache import _io
    except ImportError as error:
        if "cannot import name" in str(error):
            return "the native engine was not built (it wants g++ with C++20 and Python's headers at installation)"
        return f"the native engine does not load ({error})"
    if _io.ABI != _ABI:
        return f"the native engine is of another version of this package ({_io.ABI} instead of {_ABI}): install anew"
    return None


def why_no_uring() -> str | None:
    """None when the `uring` backend can be used, else why not, for people."""
    from_build = why_not_built()
    if from_build is not None:
        return from_build
    from mii_hcache import _io

    return _io.why_no_uring()


def why_no_spdk() -> str | None:
    """None when SPDK is built into the native engine, else why not, for people."""
    from_build = why_not_built()
    if from_build is not None:
        return from_build
    from mii_hcache import _io

    return _io.why_no_spdk()


def why_no_gdr() -> str | None:
    """None when GDRCopy's library and driver can be used here, else why not, for people."""
    from_build = why_not_built()
    if from_build is not None:
        return from_build
    from mii_hcache import _io

    return _io.why_no_gdr()


def new_controller(transport_id: str, depth: int, **options: Any) -> _io.NvmeController:
    """Connect to an NVMe controller. Only where the engine is built. Raises RuntimeError with the reason."""
    from mii_hcache import _io

    return _io.NvmeController(transport_id, depth, **options)


def new_device(depth: int) -> _io.Device:
    """A ring and its thread. Only where `why_no_uring` is None. Raises OSError."""
    from mii_hcache import _io

    return _io.Device(depth)
