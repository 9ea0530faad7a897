"""Portable DeepSpeed modules in plain PyTorch, registered under the stock names that DeepSpeed's heuristics ask for.

They run wherever torch runs. One rotary implementation serves generation and restoration: two would drift apart.
"""

from __future__ import annotations


def register() -> None:
    """Put the portable modules into DeepSpeed's registries. Call after `compat` has patched the runtime."""
    from deepspeed.inference.v2.modules import interfaces

    from mii_hcache.engine.modules.attention import PagedAttention
    from mii_hcache.engine.modules.embedding import Embedding, Unembedding
    from mii_hcache.engine.modules.linear import Linear
    from mii_hcache.engine.modules.moe import MixtureOfExperts
    from mii_hcache.engine.modules.norm import PreLayerNorm, PreRMSNorm

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
