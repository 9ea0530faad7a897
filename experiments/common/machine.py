"""What numbers were measured on."""

from __future__ import annotations

import platform
from typing import Any

import torch

import mii_hcache
from mii_hcache.runtime.machine import cpu_name, num_usable_cpus


def machine() -> dict[str, Any]:
    """For lines of JSON."""
    return {
        "cpu": cpu_name(),
        "cores": num_usable_cpus(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mii_hcache": mii_hcache.__version__,
        "kind": "measured",
    }
