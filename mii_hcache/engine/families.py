"""Which model families are served, each with its policy and the configs that are refused.

A model that cannot be served right is refused at start: a wrong answer is worse than none.
"""

# No `from __future__ import annotations` here: the host's container metaclass reads the annotations as classes.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepspeed.inference.v2.model_implementations.common_parameters import (
    EmbeddingParameter,
    NormParameter,
    UnembedParameter,
)
from deepspeed.inference.v2.model_implementations.inference_policy_base import InferenceV2Policy
from deepspeed.inference.v2.model_implementations.layer_container_base import LayerContainer
from deepspeed.inference.v2.model_implementations.llama_v2.policy import Llama2Policy
from deepspeed.inference.v2.model_implementations.opt.policy import OPTPolicy

from mii_hcache.engine.models import LlamaModel, OptModel, inverse_frequencies
from mii_hcache.errors import UnsupportedModelError


class TiedEnds(LayerContainer):  # type: ignore[misc]
    """Embedding and output head from one tensor of the checkpoint (two copies in memory)."""

    word_emb: EmbeddingParameter
    word_unembed: UnembedParameter
    final_norm: NormParameter

    PARAM_MAPPING = {  # noqa: RUF012  (an annotation would make it a parameter)
        "model.embed_tokens.weight": ["word_emb.params", "word_unembed.params"],
        "model.norm.weight": "final_norm.params",
    }


class LlamaPolicy(Llama2Policy):  # type: ignore[misc]
    """Llama with our model class, tied heads included."""

    def instantiate_model(self, engine_config: Any, mp_group: Any) -> LlamaModel:
        return LlamaModel(config=self._model_config, engine_config=engine_config, base_mp_group=mp_group)

    def build_container_map(self) -> Any:
        container_map = super().build_container_map()
        if self._model_config.tie_word_embeddings:
            container_map.set_non_transformer_params(TiedEnds(self.model))
            container_map.set_unmapped_params(["lm_head.weight"])
        return container_map


class OptPolicy(OPTPolicy):  # type: ignore[misc]
    """OPT with our model class."""

    def instantiate_model(self, engine_config: Any, mp_group: Any) -> OptModel:
        return OptModel(config=self._model_config, engine_config=engine_config, base_mp_group=mp_group)


def _refuse_llama(config: Any) -> str | None:
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act!r} (served: silu)"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "attention_bias or mlp_bias (the host's Llama containers have no biases)"
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_size * config.num_attention_heads != config.hidden_size:
        return f"{config.num_attention_heads} heads of {head_size} do not make hidden_size {config.hidden_size}"
    if getattr(config, "pretraining_tp", 1) != 1:
        return f"pretraining_tp {config.pretraining_tp} (served: 1)"
    inverse_frequencies(config)
    return None


def _refuse_opt(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "norms after the blocks, as in OPT-350m"
    if config.word_embed_proj_dim != config.hidden_size:
        return f"word_embed_proj_dim {config.word_embed_proj_dim} differs from hidden_size {config.hidden_size}"
    if config.activation_function != "relu":
        return f"activation_function {config.activation_function!r} (served: relu)"
    if not getattr(config, "enable_bias", True) or not getattr(config, "layer_norm_elementwise_affine", True):
        return "layers without biases"
    if not getattr(config, "tie_word_embeddings", True):
        return "an output head that is not tied to the embedding"
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of transformers."""

    summary: str
    policy: type[InferenceV2Policy]
    refusal: Callable[[Any], str | None]
    """The reason why a config of this family cannot be served, else None."""


FAMILIES: dict[str, Family] = {
    "llama": Family(summary="Llama 1, 2, 3, 3.1, 3.2 (text)", policy=LlamaPolicy, refusal=_refuse_llama),
    "opt": Family(summary="OPT, except 350m", policy=OptPolicy, refusal=_refuse_opt),
}


def policy_for(config: Any, checkpoint_engine: Any) -> InferenceV2Policy:
    """The policy that builds the model. Raises UnsupportedModelError with the reason and what can be served."""
    served = "; ".join(f"{name}: {family.summary}" for name, family in FAMILIES.items())
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(f"model type {config.model_type!r} is not served. Served: {served}")
    try:
        reason = family.refusal(config)
    except UnsupportedModelError as error:
        reason = str(error)
    if reason is not None:
        raise UnsupportedModelError(f"this {config.model_type} model is not served: {reason}. Served: {served}")
    return family.policy(config, checkpoint_engine=checkpoint_engine)
