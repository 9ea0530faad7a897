"""DeepSpeed's interfaces, filled in where it does not matter what computes: portable and stock modules begin here.

The names are those that DeepSpeed's heuristics ask its registries for, so whoever is registered last is taken.
`config` is the host's, of each kind of module; dtypes in it are read by `torch_dtype`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.inference.v2.inference_parameter import InferenceParameter
from deepspeed.inference.v2.modules import interfaces

from mii_hcache.engine.modules import torch_dtype
from mii_hcache.engine.modules.batch_plan import BatchPlan, make_plan
from mii_hcache.engine.modules.upload import StepUpload


class _Module:
    """What is alike for all kinds."""

    @staticmethod
    def supports_config(config: Any) -> bool:
        """What cannot be computed was refused before any module is asked for (`families`, `stock_limits`)."""
        return True

    @property
    def output(self) -> torch.Tensor:
        """The host's name for a buffer that is returned again and again. There is none: outputs are fresh tensors."""
        raise NotImplementedError("our modules return fresh tensors")


class AttentionModule(_Module, interfaces.DSSelfAttentionBase):  # type: ignore[misc]
    """One ragged batch at a time: `build_atoms` plans it, then each layer calls `forward` (protocol: `attention`)."""

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        self.plan: BatchPlan | None = None
        self._upload: StepUpload | None = None

    @staticmethod
    def name() -> str:
        return "dense_blocked_attention"

    def prepare(self, inv_freq: torch.Tensor | None, num_positions: int, windows: Sequence[int | None]) -> None:
        """Nothing, unless a set of modules wants to know beforehand."""

    def build_atoms(self, ragged_batch: Any, block_tables: list[torch.Tensor]) -> None:
        """Plan a finalized `StepBatch`. `block_tables[i]`: host block ids of sequence `i` of the batch."""
        self.plan = self._plan_of(ragged_batch, block_tables)

    def _plan_of(
        self, ragged_batch: Any, block_tables: list[torch.Tensor], extra: Sequence[torch.Tensor] = ()
    ) -> BatchPlan:
        """`extra`: arrays on the host that `forward` wants on the device, where the plan has them under this name."""
        if self._upload is None:
            self._upload = StepUpload(ragged_batch.input_ids().device)
        return make_plan(
            ragged_batch.descriptors,
            block_tables,
            self.kv_block_size,
            self._upload,
            token_ids=ragged_batch.token_ids,
            extra=extra,
        )


class NormModule(_Module, interfaces.DSPreNormBase):  # type: ignore[misc]
    """`residual += hidden_states; return residual, norm(residual)`."""

    def transform_param(self, param: torch.Tensor) -> InferenceParameter:
        return InferenceParameter.initialize(param.to(torch_dtype(self._config.output_dtype)))

    def normalize(
        self, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[num_tokens, channels]` to the same, in `out` or in memory of its own."""
        raise NotImplementedError


class RMSNormModule(NormModule):
    """RMSNorm with the epsilon of the model's config."""

    @staticmethod
    def name() -> str:
        return "cuda_pre_rms"


class LayerNormModule(NormModule):
    """LayerNorm with the epsilon of the model's config."""

    @staticmethod
    def name() -> str:
        return "cuda_pre_ln"


class LinearModule(_Module, interfaces.DSLinearBase):  # type: ignore[misc]
    """`activation(x @ weight.T + bias)`; gated: `activation(gate) * up`, whose rows the host's loader interleaves."""

    @staticmethod
    def name() -> str:
        return "blas_fp_linear"

    def transform_param(self, param: torch.Tensor) -> InferenceParameter:
        return InferenceParameter.initialize(param.to(torch_dtype(self._config.output_dtype)))


class EmbeddingModule(_Module, interfaces.DSEmbeddingBase):  # type: ignore[misc]
    """Rows of the embedding table, plus learned positions where the model has them (OPT)."""

    @staticmethod
    def name() -> str:
        return "ragged_embedding"


class UnembeddingModule(_Module, interfaces.DSUnembedBase):  # type: ignore[misc]
    """Final norm and output head for chosen rows."""

    @staticmethod
    def name() -> str:
        return "ragged_unembed"
