"""What a doctor says of raw NVMe namespaces: whether they can be used, and whether this state directory uses one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mii_hcache.errors import ConfigError
from mii_hcache.storage.native import why_no_gdr, why_no_spdk
from mii_hcache.storage.nvme import HOW_TO_BUILD, NvmeAddress
from mii_hcache.storage.state_dir import NAMESPACE_FILE
from mii_hcache.tools.findings import Check, Finding, off, problem

EXPERIMENTAL = "experimental, unverified on hardware: it has never run on an NVMe device"


def nvme_checks(directories: Sequence[Path]) -> list[tuple[str, Check]]:
    """In the order in which they should be told."""
    on_namespaces = [directory for directory in directories if (directory / NAMESPACE_FILE).exists()]
    asked = on_namespaces or directories[:1]
    return [*(("SPDK", partial(_spdk, directory)) for directory in asked), ("GDRCopy", _gdr)]


def _spdk(directory: Path) -> Finding:
    why_not = why_no_spdk()
    namespace = directory / NAMESPACE_FILE
    if namespace.exists():
        try:
            address = NvmeAddress.parse(namespace.read_text(encoding="utf-8"))
        except (ConfigError, OSError, ValueError) as error:
            return problem("SPDK", f"{namespace} cannot be used ({error})", "format anew", prevents_serving=True)
        if why_not is not None and not address.is_fake:
            return problem("SPDK", f"the segments lie on {address}, and {why_not}", HOW_TO_BUILD, prevents_serving=True)
        advice = "keep nothing there that cannot be computed again"
        return problem("SPDK", f"the segments lie on {address}: {EXPERIMENTAL}", advice)
    if why_not is not None:
        return off("SPDK", f"{why_not}; NVMe drives are used through the file system")
    return off("SPDK", f"built in, not used: {EXPERIMENTAL}", "python -m mii_hcache.storage.pyspdk --help")


def _gdr() -> Finding:
    why_not = why_no_gdr()
    if why_not is not None:
        return off("GDRCopy", f"{why_not}; state reaches a GPU through pinned host memory")
    return off("GDRCopy", f"there, and used by nothing but SPDK: {EXPERIMENTAL}")
