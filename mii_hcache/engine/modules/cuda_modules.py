"""The Triton modules with a CUDA C++ kernel for rotary embedding and the way into the blocks. **Not run on a GPU.**

Built by name only (`build_engine(kernels="cuda")`): no setting of `--kernels` leads here until a GPU has shown that it
is faster than what it replaces.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from mii_hcache.engine.kernels.cuda_rope_scatter import CudaRopeScatter
from mii_hcache.engine.modules.triton_modules import TritonAttention, register_triton
from mii_hcache.errors import ConfigError
from mii_hcache.storage.native import why_no_kernels


@functools.cache
def scatter_on(device: torch.device) -> CudaRopeScatter:
    """The kernel on one GPU; loaded once in a process, and never unloaded under what is queued."""
    return CudaRopeScatter(device)


class CudaAttention(TritonAttention):
    """`TritonAttention`, whose rows are placed by `CudaRopeScatter`, from the same tables: the same bits."""

    def rope_scatter(self, rows: torch.Tensor, *others: Any, **settings: Any) -> None:
        scatter_on(rows.device)(rows, *others, **settings)


def register_cuda(block_size: int, device_type: str) -> None:
    """Put these modules into DeepSpeed's registries. Raises ConfigError where the kernel cannot be loaded."""
    from deepspeed.inference.v2.modules import interfaces

    why_not = why_no_kernels()
    if why_not is not None:
        raise ConfigError(f"kernels is 'cuda': {why_not}")
    register_triton(block_size, device_type)
    CudaAttention.block_size = block_size
    interfaces.DSSelfAttentionRegistry.register_module(CudaAttention)
