"""The compiled engine, where it was built: the one place that imports it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mii_hcache import _io

_ABI = 5
"""Of the `_io` that this package goes with."""
_KERNELS = Path(__file__).parent.parent / "_gpu.fatbin"
"""What nvcc made of csrc/gpu, where there was one."""


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


def new_copier(num_threads: int, **settings: int) -> _io.Copier:
    """Threads that copy. Only where `why_not_built` is None."""
    from mii_hcache import _io

    return _io.Copier(num_threads, **settings)


def why_no_cufile() -> str | None:
    """None when cuFile can be used, if only in its compatibility mode, else why not, for people. Initialises the CUDA
    driver in this process, but makes no context on a GPU."""
    from_build = why_not_built()
    if from_build is not None:
        return from_build
    if not _KERNELS.exists():
        return "the GPU's checksum was not built (it wants nvcc at installation), and nothing goes unverified"
    from mii_hcache import _io

    return _io.why_no_cufile()


def how_cufile_moves_bytes() -> str:
    """Direct or not, for people. Only where `why_no_cufile` is None."""
    from mii_hcache import _io

    return _io.how_cufile_moves_bytes()


def new_cufile(gpu_idx: int, depth: int, num_threads: int) -> _io.Cufile:
    """A GPU, its queue of reads and its checksum kernel. Only where `why_no_cufile` is None. Raises OSError."""
    from mii_hcache import _io

    return _io.Cufile(gpu_idx, _KERNELS.read_bytes(), depth, num_threads)


def why_no_gpu() -> str | None:
    """None when the native engine reaches a GPU by the CUDA driver, else why not, for people. Initialises the driver in
    this process, but makes no context."""
    from_build = why_not_built()
    if from_build is not None:
        return from_build
    from mii_hcache import _io

    try:
        return None if _io.num_gpus() > 0 else "there is no GPU"
    except OSError as error:
        return f"no GPU can be used ({error.strerror})"


def new_gpu(gpu_idx: int) -> _io.Gpu:
    """Copies to a GPU, and pinned memory. Only where `why_no_gpu` is None. Takes the GPU's primary context, which is
    the one that frameworks use. Raises OSError."""
    from mii_hcache import _io

    return _io.Gpu(gpu_idx)


def why_no_kernels() -> str | None:
    """None when the compiled kernels can be loaded on a GPU of this machine, else why not, for people."""
    from_gpu = why_no_gpu()
    if from_gpu is None and not _KERNELS.exists():
        return "the CUDA kernels were not built (they want nvcc at installation)"
    return from_gpu


def new_kernels(gpu: _io.Gpu) -> _io.GpuKernels:
    """The compiled kernels on a GPU. Only where `why_no_kernels` is None. Raises OSError, also when there is no code
    for this GPU among them."""
    from mii_hcache import _io

    return _io.GpuKernels(gpu, _KERNELS.read_bytes())
