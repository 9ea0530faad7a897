"""The portable modules with our Triton kernels in the place of torch's small ones. **Not run on a GPU yet.**

Matrix products are torch's (cuBLAS). The modules agree with the plain torch ones within the noise of 16-bit sums, and
to the bit where nothing is summed; so state saved under either may be restored under the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton

from mii_hcache.engine.kernels.gate import silu_mul
from mii_hcache.engine.kernels.head_norm import norm_heads
from mii_hcache.engine.kernels.norm import add_norm
from mii_hcache.engine.kernels.paged_attention import attend_tiles
from mii_hcache.engine.kernels.rope_scatter import make_tables, rope_scatter
from mii_hcache.engine.kernels.split_merge import merge_splits
from mii_hcache.engine.kernels.work import MERGE_FIELDS, Work, plan_work, tile_shapes
from mii_hcache.engine.modules.attend import attend_gathered
from mii_hcache.engine.modules.attention import PagedAttention
from mii_hcache.engine.modules.linear import Linear
from mii_hcache.engine.modules.norm import PreLayerNorm, PreRMSNorm
from mii_hcache.errors import ConfigError

PROGRAMS_PER_SM = 2
"""Programs of attention that one multiprocessor runs at a time, roughly."""
INTERPRETED_PROGRAMS = 16
"""In the interpreter: few, and still more than one, so that tests split."""


class TritonAttention(PagedAttention):
    """`PagedAttention` with our kernels: whatever the batch, two or three launches a layer for each kind of tile."""

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        dtype = config.output_dtype
        self._group = config.n_heads_q // config.n_heads_kv
        element_bytes = getattr(dtype, "value", dtype).itemsize
        self._shapes = tile_shapes(group=self._group, head_size=config.head_size, element_bytes=element_bytes)
        self._num_programs = 0
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self._windows: list[int | None] = [None]
        self._work: dict[int | None, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        """By window: items and merges on the device, of narrow and wide tiles."""
        self._room: list[torch.Tensor] = []
        self._partials: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Partial results and their log-sums, of narrow and wide tiles: views of `_room`."""

    rope_scatter = staticmethod(rope_scatter)

    def prepare(self, inv_freq: torch.Tensor | None, num_positions: int, windows: Sequence[int | None]) -> None:
        self._rotary = None if inv_freq is None else make_tables(inv_freq, num_positions)
        self._windows = list(dict.fromkeys(windows))

    @staticmethod
    def norm_heads(
        qkv: torch.Tensor, q_gamma: torch.Tensor, k_gamma: torch.Tensor, num_kv_heads: int, eps: float
    ) -> torch.Tensor:
        """In place."""
        norm_heads(qkv, q_gamma, k_gamma, kv_heads=num_kv_heads, eps=eps)
        return qkv

    def warm_up(self, kv_cache: torch.Tensor) -> None:
        """Compile what only long histories need: a merge of nothing, for each kind of tile."""
        num_kv_heads, head_size = kv_cache.shape[-2:]
        out = kv_cache.new_empty(1, num_kv_heads * self._group * head_size)
        merges = torch.zeros(1, MERGE_FIELDS, dtype=torch.int32, device=kv_cache.device)
        for shape in self._shapes:
            partials = torch.zeros(1, num_kv_heads, shape.rows, head_size, device=kv_cache.device)
            merge_splits(merges, partials, partials[..., 0].contiguous(), out, group=self._group)

    def build_atoms(self, ragged_batch: Any, block_tables: list[torch.Tensor]) -> None:
        device = ragged_batch.input_ids().device
        if not self._num_programs:
            self._num_programs = INTERPRETED_PROGRAMS
            if device.type == "cuda":
                self._num_programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
        works = {window: self._plan_work(ragged_batch.descriptors, window) for window in self._windows}
        flat = [array for pair in works.values() for work in pair for array in (work.items, work.merges)]
        self.plan = self._plan_of(ragged_batch, block_tables, extra=flat)
        sent = iter(self.plan.extra)
        self._work = {window: [(next(sent), next(sent)) for _ in pair] for window, pair in works.items()}
        self._make_partials(
            [max(work.num_partials for work in kind) for kind in zip(*works.values(), strict=True)], device
        )

    def _plan_work(self, descriptors: list[tuple[int, int, int]], window: int | None) -> tuple[Work, Work]:
        return plan_work(
            descriptors,
            narrow=self._shapes[0],
            wide=self._shapes[1],
            group=self._group,
            num_kv_heads=self._config.n_heads_kv,
            num_programs=self._num_programs,
            window=window,
        )

    def _make_partials(self, nums: list[int], device: torch.device) -> None:
        """Room for partial results, grown in powers of two. Every layer uses it, in stream order."""
        if not self._room:
            self._room = [torch.empty(0, device=device) for _ in self._shapes]
        self._partials = []
        for idx, (num, shape) in enumerate(zip(nums, self._shapes, strict=True)):
            sizes = (num, self._config.n_heads_kv, shape.rows)
            num_sums = math.prod(sizes)
            num_floats = num_sums * (self._config.head_size + 1)
            if self._room[idx].numel() < num_floats:
                self._room[idx] = torch.empty(1 << (num_floats - 1).bit_length(), device=device)
            sums, partials = self._room[idx][:num_floats].split([num_sums, num_floats - num_sums])
            self._partials.append((partials.view(*sizes, self._config.head_size), sums.view(sizes)))

    def place(
        self,
        kv: torch.Tensor,
        kv_cache: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        inv_freq: torch.Tensor | None,
        k_gamma: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        self.rope_scatter(kv, kv_cache, positions, slots, self._rotary, query_heads=0, k_gamma=k_gamma, eps=eps)

    def forward(
        self,
        qkv: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Any,
        inv_freq: torch.Tensor | None,
        scale: float,
        softcap: float | None = None,
        window: int | None = None,
        query_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan = self.plan
        assert plan is not None
        num_heads, head_size = self._config.n_heads_q, self._config.head_size
        self.rope_scatter(qkv, kv_cache, plan.positions, plan.slots, self._rotary, query_heads=num_heads)
        out = qkv.new_empty(qkv.shape[0], num_heads * head_size)
        if query_positions is not None:
            q, attended = (
                x.view(-1, num_heads, head_size) for x in (qkv[:, : num_heads * head_size].contiguous(), out)
            )
            for sequence in plan.sequences:
                own = slice(sequence.start, sequence.start + sequence.num_tokens)
                attended[own] = attend_gathered(
                    q[own], kv_cache, sequence, query_positions[own], scale, softcap, window
                )
            return out
        for (items, merges), shape, (partials, log_sums) in zip(
            self._work[window], self._shapes, self._partials, strict=True
        ):
            attend_tiles(
                qkv,
                kv_cache,
                plan.tables,
                items,
                out,
                partials,
                log_sums,
                shape=shape,
                group=self._group,
                scale=scale,
                softcap=softcap,
                window=window,
            )
            merge_splits(merges, partials, log_sums, out, group=self._group)
        return out


class _TritonNorm:
    """Add and norm in one kernel, into `out` or the module's buffer."""

    is_rms: bool
    reuse_output: bool
    _config: Any
    _output: torch.Tensor | None

    def forward(
        self,
        residual: torch.Tensor,
        hidden_states: torch.Tensor | None,
        gamma: torch.Tensor,
        beta: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if out is None:
            if self._output is None or not self.reuse_output:
                self._output = residual.new_empty(self._config.max_tokens, self._config.channels)
            out = self._output[: residual.shape[0]]
        add_norm(residual, hidden_states, gamma, beta, out, eps=self._config.eps, is_rms=self.is_rms)
        return residual, out


class TritonRMSNorm(_TritonNorm, PreRMSNorm):
    """`PreRMSNorm`."""

    is_rms = True


class TritonLayerNorm(_TritonNorm, PreLayerNorm):
    """`PreLayerNorm`."""

    is_rms = False


class TritonLinear(Linear):
    """`Linear`, with SiLU and its product in one pass."""

    def forward(self, hidden_states: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        if not self._is_gated or self.activation is not F.silu:
            return super().forward(hidden_states, w, b)
        return silu_mul(F.linear(hidden_states, w, b))


def register_triton(block_size: int, device_type: str) -> None:
    """Put these modules into DeepSpeed's registries. Raises ConfigError on a CPU without Triton's interpreter."""
    from deepspeed.inference.v2.modules import interfaces

    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise ConfigError("kernels is 'triton': without a GPU they run in the interpreter only (TRITON_INTERPRET=1)")
    TritonAttention.block_size = block_size
    interfaces.DSSelfAttentionRegistry.register_module(TritonAttention)
    interfaces.DSPreNormRegistry.register_module(TritonRMSNorm)
    interfaces.DSPreNormRegistry.register_module(TritonLayerNorm)
    interfaces.DSLinearRegistry.register_module(TritonLinear)
