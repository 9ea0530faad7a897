"""Where a checkpoint's tensors go: parameter containers that the host does not have."""

# No `from __future__ import annotations` here: the host's container metaclass reads the annotations as classes, and a
# class attribute with an annotation is a parameter to it.

from deepspeed.inference.v2.model_implementations.common_parameters import (
    AttentionOutputParameter,
    EmbeddingParameter,
    GatedMLPParameter,
    MLP2Parameter,
    NormParameter,
    UnembedParameter,
    UnfusedQKVParameter,
)
from deepspeed.inference.v2.model_implementations.layer_container_base import LayerContainer
from deepspeed.inference.v2.model_implementations.llama_v2.container import Llama2TransformerContainer


class Ends(LayerContainer):  # type: ignore[misc]
    """Embedding, final norm and an output head of its own."""

    word_emb: EmbeddingParameter
    word_unembed: UnembedParameter
    final_norm: NormParameter

    PARAM_MAPPING = {  # noqa: RUF012
        "model.embed_tokens.weight": "word_emb.params",
        "lm_head.weight": "word_unembed.params",
        "model.norm.weight": "final_norm.params",
    }


class TiedEnds(LayerContainer):  # type: ignore[misc]
    """Embedding and output head from one tensor of the checkpoint (two copies in memory)."""

    word_emb: EmbeddingParameter
    word_unembed: UnembedParameter
    final_norm: NormParameter

    PARAM_MAPPING = {  # noqa: RUF012
        "model.embed_tokens.weight": ["word_emb.params", "word_unembed.params"],
        "model.norm.weight": "final_norm.params",
    }


class QkNormLayer(LayerContainer):  # type: ignore[misc]
    """A Llama layer with a norm over each head of Q and K (Qwen3)."""

    qkv_w: UnfusedQKVParameter
    attn_out_w: AttentionOutputParameter
    mlp_1_w: GatedMLPParameter
    mlp_2_w: MLP2Parameter
    attn_norm_gamma: NormParameter
    mlp_norm_gamma: NormParameter
    q_norm_gamma: NormParameter
    k_norm_gamma: NormParameter

    PARAM_MAPPING = {  # noqa: RUF012
        **Llama2TransformerContainer.PARAM_MAPPING,
        "self_attn.q_norm.weight": "q_norm_gamma.params",
        "self_attn.k_norm.weight": "k_norm_gamma.params",
    }
