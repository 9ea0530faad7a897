"""What has this machine to run a model with?"""

from __future__ import annotations

import os
from pathlib import Path

from mii_hcache.config import HCacheConfig
from mii_hcache.runtime.machine import cpu_features, cpu_name, num_usable_cpus
from mii_hcache.tools.findings import Check, Finding, off, ok, problem
from mii_hcache.tools.table import size

_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def machine_checks() -> list[tuple[str, Check]]:
    """In the order in which they should be told."""
    return [
        ("GPU", _gpu),
        ("ranks", _ranks),
        ("CPU", _cpu),
        ("16 bit on CPU", _sixteen_bit),
        ("memory", _memory),
        ("pinned memory", _pinned),
        ("crc32c", _crc32c),
    ]


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        more = (
            f"; {torch.cuda.device_count()} in all: --tensor-parallel uses several"
            if torch.cuda.device_count() > 1
            else ""
        )
        capability = f"{properties.major}.{properties.minor}"
        return ok("GPU", f"{properties.name}, {size(properties.total_memory)}, compute capability {capability}{more}")
    if not _DRIVER.exists():
        return off("GPU", "no NVIDIA driver is loaded: models run on the CPU")
    if torch.version.cuda is None:
        reason = "an NVIDIA driver is loaded, but this torch is built for CPUs only"
        return problem("GPU", reason, "install a CUDA build of torch; scripts/bootstrap.sh looks for one")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
    reason = f"torch is built for CUDA {torch.version.cuda} and finds no device{hidden}"
    return problem("GPU", reason, "see what nvidia-smi says; the driver may be too old for this CUDA")


def _ranks() -> Finding:
    """A model over several processes: what they would talk over."""
    import torch
    import torch.distributed as torch_dist

    on_gpus = torch.cuda.is_available()
    backend = "nccl" if on_gpus else "gloo"
    if not torch_dist.is_available() or not torch_dist.is_backend_available(backend):
        reason = f"this torch has no {backend}: a model cannot be split over processes (--tensor-parallel)"
        return off("ranks", reason)
    if not on_gpus:
        return ok("ranks", f"gloo: --tensor-parallel up to {max(2, num_usable_cpus())} on these cores")
    count = torch.cuda.device_count()
    if count < 2:
        return off("ranks", "NCCL, and one GPU: --tensor-parallel needs one for each rank")
    return ok("ranks", f"NCCL: --tensor-parallel up to {count}; it has not run on GPUs yet")


def _cpu() -> Finding:
    import torch

    threads, usable = torch.get_num_threads(), num_usable_cpus()
    reason = f"{cpu_name()}, {threads} threads on {usable} usable cores"
    granted = _granted_cpus()
    if granted is not None and granted < threads:
        reason += f", of which this container may keep {granted:g} busy"
        return problem("CPU", reason, f"set OMP_NUM_THREADS={max(1, int(granted))}: threads that wait in turn are slow")
    if threads > usable:
        return problem("CPU", reason, f"set OMP_NUM_THREADS={usable}")
    if threads < usable // 2:
        return ok("CPU", reason, "a model on the CPU may run faster with a larger OMP_NUM_THREADS")
    return ok("CPU", reason)


def _granted_cpus() -> float | None:
    """Cores' worth of time that the control group grants, None when it does not limit it."""
    try:
        quota, period = _CPU_MAX.read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _sixteen_bit() -> Finding:
    features = cpu_features()
    fast = [word for word in features if word in ("amx_bf16", "avx512_bf16", "avx512_fp16", "bf16")]
    if fast:
        return ok("16 bit on CPU", ", ".join(fast))
    best = next((word for word in ("avx512f", "avx2", "sve", "asimd") if word in features), "nothing")
    reason = f"no AMX, no AVX512-BF16, {best} at best: bfloat16 may be slower than float32 on this CPU"
    return off("16 bit on CPU", reason, "on the CPU, try --dtype float32")


def _memory() -> Finding:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    values = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    reason = f"{size(values['MemAvailable'])} of {size(values['MemTotal'])} are available"
    wanted = HCacheConfig().dram_capacity_bytes
    if values["MemAvailable"] < wanted:
        advice = "take a smaller --dram-capacity"
        return problem("memory", f"{reason}; a server takes {size(wanted)} for saved state", advice)
    return ok("memory", reason)


def _pinned() -> Finding:
    from mii_hcache.runtime.pinned import TO_PIN_MORE, pinned_memory

    memory = pinned_memory()
    if memory is None:
        return off("pinned memory", "no GPU to copy from, or its driver does not answer")
    piece = memory.empty(1)
    pinned_bytes, why_not = memory.pinned_bytes, memory.why_not_pinned
    del piece
    if why_not is not None:
        reason = f"host memory cannot be pinned ({why_not}): copies from and to the GPU are slow and hold up the engine"
        return problem("pinned memory", reason, TO_PIN_MORE)
    near = f", touched on {memory.num_near_cpus} CPUs near the GPU" if memory.num_near_cpus else ""
    return ok("pinned memory", f"{size(pinned_bytes)} were pinned at once, unverified on hardware{near}")


def _crc32c() -> Finding:
    import crc32c

    if crc32c.hardware_based:
        return ok("crc32c", f"{crc32c.__version__}, by the processor's own instruction")
    reason = f"{crc32c.__version__}, in software: checksums may be slower than the disk"
    return off("crc32c", reason, "install a crc32c built for this processor")
