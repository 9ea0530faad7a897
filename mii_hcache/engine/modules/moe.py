"""Mixture of experts: each expert runs over the tokens that chose it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.inference.v2.inference_parameter import InferenceParameter
from deepspeed.inference.v2.inference_utils import ActivationType
from deepspeed.inference.v2.modules.interfaces import DSMoEBase

from mii_hcache.engine.modules import torch_dtype
from mii_hcache.engine.modules.linear import ACTIVATIONS


class MixtureOfExperts(DSMoEBase):  # type: ignore[misc]
    """Softmax over all experts, the best `top_k` of them, weights normalised to one (Mixtral)."""

    @staticmethod
    def name() -> str:
        return "cutlass_multi_gemm_moe"

    @staticmethod
    def supports_config(config: Any) -> bool:
        return True

    @property
    def output(self) -> torch.Tensor:
        raise NotImplementedError("the portable mixture of experts returns fresh tensors")

    def _to_dtype(self, param: torch.Tensor) -> InferenceParameter:
        return InferenceParameter.initialize(param.to(torch_dtype(self._config.output_dtype)))

    def transform_gate_param(self, param: torch.Tensor) -> InferenceParameter:
        return self._to_dtype(param)

    def transform_moe_mlp_1_param(self, param: torch.Tensor) -> InferenceParameter:
        """`[num_experts, 2 * intermediate, hidden]`, gate and up rows interleaved: parted again as in `Linear`."""
        return self._to_dtype(torch.cat([param[:, 0::2], param[:, 1::2]], dim=1))

    def transform_moe_mlp_2_param(self, param: torch.Tensor) -> InferenceParameter:
        return self._to_dtype(param)

    def forward(
        self, hidden_states: torch.Tensor, gate_w: torch.Tensor, mlp_1_w: torch.Tensor, mlp_2_w: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states: `[num_tokens, hidden_size]`; gate_w: `[num_experts, hidden_size]`. Returns the same shape."""
        activation = ACTIVATIONS[ActivationType(self._config.activation)]
        probabilities = F.linear(hidden_states, gate_w).float().softmax(-1)
        weights, chosen = probabilities.topk(self._config.top_k, dim=-1)
        if self._config.normalize_scores:
            weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros_like(hidden_states)
        for expert in chosen.unique().tolist():
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden_states[tokens], mlp_1_w[expert]).chunk(2, dim=-1)
            expert_out = F.linear(activation(gate) * up, mlp_2_w[expert])
            mixed.index_add_(0, tokens, (expert_out * weights[tokens, place, None]).to(mixed.dtype))
        return mixed
