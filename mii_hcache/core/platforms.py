"""The platforms of the paper's table 2, and the H200, as profiles that ship.

Rates are effective ones (from this project's study of the paper's numbers): about 0.8 of a
datasheet's dense 16-bit FLOP/s for the A100, 25 of PCIe 4's 32 GB/s, 6.9 GB/s for each PM9A3. They agree with what the
paper prints: KV offload from four SSDs reads 24.2 GB/s, from one 7.1; hidden states are projected at 197 (7B) and 215
(13B) TFLOP/s. A plan moves with 10 % in any of them, so measure the machine that restores; these are for comparing.
"""

from __future__ import annotations

from mii_hcache.core.cost import HardwareProfile
from mii_hcache.errors import ConfigError

_GB, _TFLOP = 1e9, 1e12
_SSD_BYTES_PER_S = 6.9 * _GB
_LINK_BYTES_PER_S = 200 * _GB
_IO_START_S = 3e-6
"""A copy that is queued behind others; the 12 us of a lone one are hidden."""
_C_START_S = 12e-6
"""Three launches of 4 us."""
_STUDY = "effective rates, assumed: about 0.8 of the datasheets'"


def _platform(
    name: str, source: str, *, read: float, h2d: float, gemm: float, attention: float, num_gpus: int = 1
) -> HardwareProfile:
    """GB/s and TFLOP/s as tables print them. A platform without SSDs reads from host memory."""
    is_ssd = name.endswith("ssd")
    tiers = {"file": read * _GB, "memory": num_gpus * h2d * _GB} if is_ssd else {"memory": read * _GB}
    return HardwareProfile(
        name=name,
        source=source,
        read_bytes_per_s=tiers,
        h2d_bytes_per_s=h2d * _GB,
        gemm_flop_per_s=gemm * _TFLOP,
        attention_flop_per_s=attention * _TFLOP,
        num_gpus=num_gpus,
        link_bytes_per_s=_LINK_BYTES_PER_S,
        io_start_s=_IO_START_S,
        c_start_s=_C_START_S,
    )


def _a100(num_ssds: int, num_gpus: int = 1) -> HardwareProfile:
    gpus = f"{num_gpus}x" if num_gpus > 1 else ""
    shared = "; the SSDs are shared by the GPUs, hidden rows gathered over NVLink" if num_gpus > 1 else ""
    return _platform(
        f"{gpus}a100-{num_ssds}ssd",
        f"A100-40G of the paper (section 6, {num_ssds} x PM9A3 at 6.9 GB/s{shared}); {_STUDY}",
        read=num_ssds * _SSD_BYTES_PER_S / _GB,
        h2d=25,
        gemm=250,
        attention=180,
        num_gpus=num_gpus,
    )


def _dram(name: str, gpu: str, h2d: float, gemm: float, attention: float, source: str = "") -> HardwareProfile:
    source = source or f"{gpu} of the paper's table 2, host memory backend; {_STUDY}"
    return _platform(name, source, read=h2d, h2d=h2d, gemm=gemm, attention=attention)


PLATFORMS: dict[str, HardwareProfile] = {
    platform.name: platform
    for platform in (
        _a100(1),
        _a100(2),
        _a100(4),
        _dram("a100-dram", "A100-40G", 25, 250, 180),
        _dram("a30-dram", "A30", 25, 125, 90),
        _platform(
            "a30-4ssd",
            f"A30 of the paper's figure 12 (4 x PM9A3 at 6.9 GB/s); {_STUDY}",
            read=4 * _SSD_BYTES_PER_S / _GB,
            h2d=25,
            gemm=125,
            attention=90,
        ),
        _dram("4090-dram", "RTX 4090", 25, 150, 140),
        _dram("l20-dram", "L20", 25, 105, 95),
        _dram("h800-dram", "H800", 55, 680, 400),
        _dram("h200-dram", "H200", 55, 760, 420, source=f"H200 with PCIe 5; expected, not measured: {_STUDY}"),
        _a100(4, num_gpus=4),
    )
}
"""By name. `4xa100-4ssd` is OPT-30B's tensor-parallel machine."""


def platform_named(name: str) -> HardwareProfile:
    """Raises ConfigError for an unknown name."""
    try:
        return PLATFORMS[name]
    except KeyError:
        raise ConfigError(f"profile must be one of {', '.join(PLATFORMS)}, got {name!r}") from None
