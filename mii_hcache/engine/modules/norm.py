"""Pre-norms that add into the residual and reuse one output buffer, as DeepSpeed's CUDA modules do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mii_hcache.engine.modules.bases import LayerNormModule, NormModule, RMSNormModule


def rms_norm(x: torch.Tensor, gamma: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """RMSNorm over the last axis: statistics in float32, scaled in `x.dtype` (as Hugging Face's Llama does). Into
    `out`, of the shape and dtype of `x`, if it is given."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return torch.mul(gamma, wide.to(x.dtype), out=out)


def norm_heads(
    qkv: torch.Tensor, q_gamma: torch.Tensor, k_gamma: torch.Tensor, num_kv_heads: int, eps: float
) -> torch.Tensor:
    """RMSNorm over each query and each key head: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_size]`, as given.
    q_gamma, k_gamma: `[head_size]`. `qkv` may be overwritten."""
    head_size = q_gamma.shape[0]
    heads = qkv.unflatten(-1, (-1, head_size))
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    return torch.cat([rms_norm(q, q_gamma, eps), rms_norm(k, k_gamma, eps), v], dim=1).flatten(1)


class _PreNorm(NormModule):
    """What is returned lies in `out`, if the caller gave it (`[num_tokens, channels]`, contiguous), else in one buffer
    per module that the next call overwrites: whoever keeps it must copy first. This is what the host's CUDA modules do,
    so that a copy made too late is caught on CPU as well."""

    reuse_output: bool = True
    """False returns fresh tensors (one smoke test runs so)."""

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        self._output: torch.Tensor | None = None

    def forward(
        self,
        residual: torch.Tensor,
        hidden_states: torch.Tensor | None,
        gamma: torch.Tensor,
        beta: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if hidden_states is not None:
            residual.add_(hidden_states)
        if out is None and self.reuse_output:
            if self._output is None:
                self._output = residual.new_empty(self._config.max_tokens, self._config.channels)
            out = self._output[: residual.shape[0]]
        return residual, self.normalize(residual, gamma, beta, out)


class PreRMSNorm(_PreNorm, RMSNormModule):
    """RMSNorm in plain torch."""

    def normalize(
        self, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return rms_norm(x, gamma, self._config.eps, out)


class PreLayerNorm(_PreNorm, LayerNormModule):
    """LayerNorm in plain torch."""

    def normalize(
        self, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        normed = F.layer_norm(x, x.shape[-1:], gamma, beta, self._config.eps)
        return normed if out is None else out.copy_(normed)
