"""What this machine and its software are called: for reports that others must be able to judge."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU_WORDS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "bf16", "sve", "asimd")
"""Words of `/proc/cpuinfo` that decide how fast a model runs on the CPU."""


def package_version(name: str) -> str | None:
    """Version of an installed distribution, None when it is not there. Imports nothing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as the kernel tells it."""
    lines = dict(_cpuinfo())
    return lines.get("model name") or lines.get("Model") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of `CPU_WORDS` that this processor has."""
    lines = dict(_cpuinfo())
    found = set((lines.get("flags") or lines.get("Features") or "").split())
    return [word for word in CPU_WORDS if word in found]


def num_usable_cpus() -> int:
    """Cores that this process may run on, not those that the machine has."""
    return len(os.sched_getaffinity(0))


def device_name(device: torch.device) -> str:
    """The GPU, or the CPU with its threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def software() -> dict[str, str | None]:
    """Versions that results depend on."""
    names = ("torch", "deepspeed", "deepspeed-mii", "transformers")
    return {"python": platform.python_version(), **{name: package_version(name) for name in names}}


def filesystem_of(path: Path) -> str:
    """Type of the file system that holds `path` (`ext4`, `tmpfs`, ...), `unknown` where the kernel does not say."""
    path = path.resolve()
    best, kind = "", "unknown"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return kind
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        mount_point = fields.split()[4].encode().decode("unicode_escape")
        is_above = mount_point == "/" or path == Path(mount_point) or Path(mount_point) in path.parents
        if is_above and len(mount_point) >= len(best):
            best, kind = mount_point, rest.split()[0]
    return kind


def _cpuinfo() -> list[tuple[str, str]]:
    """Of the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    first = text.split("\n\n")[0]
    return [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in first.splitlines())]
