"""Which model families are served, each with its model, its containers and the configs that are refused.

One table. A model that cannot be served right is refused at start: a wrong answer is worse than none. How to add a
family is written in `mii_hcache/engine/README.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepspeed.inference.v2.model_implementations.inference_policy_base import ContainerMap, InferenceV2Policy
from deepspeed.inference.v2.model_implementations.llama_v2.container import Llama2TransformerContainer
from deepspeed.inference.v2.model_implementations.mixtral.container import MixtralTransformerContainer
from deepspeed.inference.v2.model_implementations.opt.container import (
    OPTNonTransformerContainer,
    OPTTransformerContainer,
)
from deepspeed.inference.v2.model_implementations.phi3.containers import Phi3TransformerContainer
from deepspeed.inference.v2.model_implementations.qwen_v2.container import Qwen2TransformerContainer

from mii_hcache.engine.containers import Ends, QkNormLayer, TiedEnds
from mii_hcache.engine.models import DecoderMixin, GemmaModel, LlamaModel, MixtralModel, OptModel
from mii_hcache.engine.parallel.group import RankGroup
from mii_hcache.engine.parallel.shards import split_refusal
from mii_hcache.engine.rotary import head_size_of, inverse_frequencies
from mii_hcache.errors import UnsupportedModelError

Refusal = Callable[[Any], str | None]
"""The reason why a config cannot be served, else None."""


def _refuse_rotary(config: Any) -> str | None:
    """What all rotary families share. Raises UnsupportedModelError for rotary variants."""
    if inverse_frequencies(config).numel() * 2 > head_size_of(config):
        return "more rotary dimensions than a head has"
    if getattr(config, "pretraining_tp", 1) not in (1, None):
        return f"pretraining_tp {config.pretraining_tp} (served: 1)"
    return None


def _refuse_plain(config: Any) -> str | None:
    """No biases, gated SiLU."""
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act!r} (served: silu)"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "attention_bias or mlp_bias"
    return _refuse_rotary(config)


def _refuse_qwen2(config: Any) -> str | None:
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act!r} (served: silu)"
    return _refuse_rotary(config)


def _refuse_gemma(config: Any) -> str | None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ("gelu_pytorch_tanh", "gelu"):  # checkpoints that say gelu were trained with tanh
        return f"hidden_activation {activation!r} (served: gelu_pytorch_tanh)"
    if activation == "gelu" and config.hidden_act == "gelu":
        return "hidden_act 'gelu' (transformers computes the exact GELU for it; served: gelu_pytorch_tanh)"
    if getattr(config, "attention_bias", False):
        return "attention_bias"
    if getattr(config, "use_bidirectional_attention", None):
        return "bidirectional attention"
    return _refuse_rotary(config)


def _refuse_opt(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "norms after the blocks, as in OPT-350m"
    if getattr(config, "_remove_final_layer_norm", False):
        return "no final norm"
    if config.word_embed_proj_dim != config.hidden_size:
        return f"word_embed_proj_dim {config.word_embed_proj_dim} differs from hidden_size {config.hidden_size}"
    if config.activation_function != "relu":
        return f"activation_function {config.activation_function!r} (served: relu)"
    if not getattr(config, "enable_bias", True) or not getattr(config, "layer_norm_elementwise_affine", True):
        return "layers without biases"
    if not config.tie_word_embeddings:
        return "an output head that is not tied to the embedding"
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of transformers."""

    summary: str
    model: type[DecoderMixin]
    layer: type
    """Container of one layer's parameters."""
    refusal: Refusal
    ends: type = Ends
    """Container of embedding, final norm and output head, when the head is not tied."""
    tied_ends: type = TiedEnds
    layer_prefixes: tuple[str, ...] = ("model.layers",)
    """Names of the layer list in checkpoints."""


FAMILIES: dict[str, Family] = {
    "llama": Family(
        summary="Llama 1, 2, 3, 3.1, 3.2 (text)",
        model=LlamaModel,
        layer=Llama2TransformerContainer,
        refusal=_refuse_plain,
    ),
    "mistral": Family(
        summary="Mistral (sliding windows honoured)",
        model=LlamaModel,
        layer=Llama2TransformerContainer,
        refusal=_refuse_plain,
    ),
    "mixtral": Family(summary="Mixtral", model=MixtralModel, layer=MixtralTransformerContainer, refusal=_refuse_plain),
    "qwen2": Family(
        summary="Qwen1.5, Qwen2, Qwen2.5 (dense)",
        model=LlamaModel,
        layer=Qwen2TransformerContainer,
        refusal=_refuse_qwen2,
    ),
    "qwen3": Family(summary="Qwen3 (dense)", model=LlamaModel, layer=QkNormLayer, refusal=_refuse_plain),
    "phi3": Family(
        summary="Phi-3 without LongRoPE", model=LlamaModel, layer=Phi3TransformerContainer, refusal=_refuse_plain
    ),
    "gemma": Family(summary="Gemma 1", model=GemmaModel, layer=Llama2TransformerContainer, refusal=_refuse_gemma),
    "opt": Family(
        summary="OPT, except 350m",
        model=OptModel,
        layer=OPTTransformerContainer,
        refusal=_refuse_opt,
        tied_ends=OPTNonTransformerContainer,
        layer_prefixes=("model.decoder.layers", "decoder.layers"),
    ),
}


class DecoderPolicy(InferenceV2Policy):  # type: ignore[misc]
    """Builds any family of the table; nothing of the host is edited."""

    group: RankGroup | None = None
    """The ranks that the model is split over."""

    @property
    def family(self) -> Family:
        """The config's entry in the table."""
        return FAMILIES[self._model_config.model_type]

    def instantiate_model(self, engine_config: Any, mp_group: Any) -> DecoderMixin:
        return self.family.model(
            config=self._model_config, engine_config=engine_config, base_mp_group=mp_group, group=self.group
        )

    def build_container_map(self) -> ContainerMap:
        family, model = self.family, self.model
        is_tied = self._model_config.tie_word_embeddings
        container_map = ContainerMap()
        container_map.set_transformer_params(
            list(family.layer_prefixes), [family.layer(model) for _ in range(model.num_layers)]
        )
        container_map.set_non_transformer_params((family.tied_ends if is_tied else family.ends)(model))
        stale = [
            f"{prefix}.{idx}.self_attn.rotary_emb.inv_freq"
            for prefix in family.layer_prefixes
            for idx in range(model.num_layers)
        ]
        container_map.set_unmapped_params([*stale, *(["lm_head.weight"] if is_tied else [])])
        return container_map


def policy_for(config: Any, checkpoint_engine: Any, group: RankGroup | None = None) -> InferenceV2Policy:
    """The policy that builds the model, or this rank's share of it. Raises UnsupportedModelError with the reason and
    what can be served."""
    reason = refusal_of(config)
    if reason is not None:
        served = "; ".join(f"{name}: {family.summary}" for name, family in FAMILIES.items())
        raise UnsupportedModelError(f"{reason}. Served: {served}")
    policy = DecoderPolicy(config, checkpoint_engine=checkpoint_engine)
    if group is not None and group.size > 1:
        reason = split_refusal(config, group.size)
        if reason is not None:
            raise UnsupportedModelError(reason)
        policy.group = group
    return policy


def refusal_of(config: Any) -> str | None:
    """Why a model is not served, from its transformers config; None when it is."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"model type {config.model_type!r} is not served"
    try:
        reason = family.refusal(config)
    except UnsupportedModelError as error:
        reason = str(error)
    return None if reason is None else f"this {config.model_type} model is not served: {reason}"
