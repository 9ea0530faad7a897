"""DeepSpeed modules that compute: our portable ones, in plain torch or with our Triton kernels, or the host's own.

All are registered under the stock names that DeepSpeed's heuristics ask for. One rotary implementation serves
generation and restoration: two would drift apart.
"""

from __future__ import annotations

import importlib.util
import logging

from mii_hcache.errors import ConfigError

_log = logging.getLogger(__name__)

REGISTRABLE = ("torch", "triton", "stock", "cuda")
"""Sets of modules by what computes. `triton` on a CPU runs in Triton's interpreter (TRITON_INTERPRET=1): for tests.
`cuda` is `triton` with one kernel in CUDA C++: by this name only, to measure it."""


def resolve(kernels: str, device_type: str) -> str:
    """One of `REGISTRABLE` for a setting of `--kernels` (or one of those names itself). Raises ConfigError.

    `auto` is `portable`: on a GPU our kernels need nothing but torch and keep float32 rotary frequencies, and which set
    is faster where was never measured. That measurement will decide, per GPU. `portable` is Triton on a GPU; where
    Triton is missing (it comes with every CUDA build of torch for Linux) it is plain torch, several times slower.
    """
    if kernels in REGISTRABLE:
        return kernels
    if kernels not in ("auto", "portable"):
        raise ConfigError(f"kernels must be auto, portable or stock, got {kernels!r}")
    if device_type != "cuda":
        return "torch"
    if importlib.util.find_spec("triton") is None:
        _log.warning("Triton is not installed: attention runs in plain torch, several times slower; pip install triton")
        return "torch"
    return "triton"


def register(kernels: str, device_type: str, *, block_size: int) -> str:
    """Put a set of modules into DeepSpeed's registries, in the place of whatever is there; models built from now on
    take it. `block_size`: tokens per KV block, where the set leaves the choice. Returns the set's name (`resolve`).
    Raises ConfigError when the set cannot be had here. Call after `compat` has patched the runtime."""
    name = resolve(kernels, device_type)
    _register_torch(block_size)
    if name == "stock":
        from mii_hcache.engine.modules.stock import register_stock

        register_stock()
    elif name == "triton":
        from mii_hcache.engine.modules.triton_modules import register_triton

        register_triton(block_size, device_type)
    elif name == "cuda":
        from mii_hcache.engine.modules.cuda_modules import register_cuda

        register_cuda(block_size, device_type)
    return name


def _register_torch(block_size: int) -> None:
    from deepspeed.inference.v2.modules import interfaces

    from mii_hcache.engine.modules.attention import PagedAttention
    from mii_hcache.engine.modules.embedding import Embedding, Unembedding
    from mii_hcache.engine.modules.linear import Linear
    from mii_hcache.engine.modules.moe import MixtureOfExperts
    from mii_hcache.engine.modules.norm import PreLayerNorm, PreRMSNorm

    PagedAttention.block_size = block_size
    interfaces.DSSelfAttentionRegistry.register_module(PagedAttention)
    interfaces.DSEmbeddingRegistry.register_module(Embedding)
    interfaces.DSUnembedRegistry.register_module(Unembedding)
    interfaces.DSLinearRegistry.register_module(Linear)
    interfaces.DSMoERegistry.register_module(MixtureOfExperts)
    interfaces.DSPreNormRegistry.register_module(PreLayerNorm)
    interfaces.DSPreNormRegistry.register_module(PreRMSNorm)


def torch_dtype(dtype: object) -> object:
    """The torch dtype behind DeepSpeed's `DtypeEnum` (its configs hold sometimes the enum, sometimes the value)."""
    return getattr(dtype, "value", dtype)
