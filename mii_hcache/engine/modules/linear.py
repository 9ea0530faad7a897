"""Linear layers with an optional, possibly gated, activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.inference.v2.inference_parameter import InferenceParameter
from deepspeed.inference.v2.inference_utils import ActivationType, is_gated

from mii_hcache.engine.modules.bases import LinearModule

ACTIVATIONS: dict[ActivationType, Callable[[torch.Tensor], torch.Tensor]] = {
    ActivationType.GELU: F.gelu,
    ActivationType.RELU: F.relu,
    ActivationType.SILU: F.silu,
    ActivationType.IDENTITY: lambda x: x,
    ActivationType.GEGLU: F.gelu,
    ActivationType.ReGLU: F.relu,
    ActivationType.SiGLU: F.silu,
}


class Linear(LinearModule):
    """In plain torch. `transform_param` parts the rows of gate and up projections again, so that the halves of the
    product are contiguous."""

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        activation = ActivationType(config.activation)
        self._is_gated = is_gated(activation)
        self.activation = ACTIVATIONS[activation]
        """Replaceable by families whose activation the host has no name for."""

    def transform_param(self, param: torch.Tensor) -> InferenceParameter:
        if self._is_gated:
            param = torch.cat([param[0::2], param[1::2]])
        return super().transform_param(param)

    def forward(self, hidden_states: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        product = F.linear(hidden_states, w, b)
        if not self._is_gated:
            return self.activation(product)
        gate, up = product.chunk(2, dim=-1)
        return self.activation(gate) * up
