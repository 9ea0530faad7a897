"""HCacheEngine: DeepSpeed's ragged engine, with sequences that can be evicted, truncated and restored."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.inference.v2.config_v2 import RaggedInferenceEngineConfig
from deepspeed.inference.v2.engine_v2 import InferenceEngineV2
from deepspeed.inference.v2.scheduling_utils import SchedulingResult

from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.engine.checkpoint import open_checkpoint
from mii_hcache.engine.parallel.group import RankGroup
from mii_hcache.engine.parallel.one import OneProcess
from mii_hcache.engine.pool_size import default_num_blocks, stock_block_size
from mii_hcache.engine.ragged_batch import StepBatch
from mii_hcache.engine.sequence_blocks import SequenceBlocks, held_blocks, sent
from mii_hcache.errors import ConfigError, HCacheError, UnsupportedModelError
from mii_hcache.runtime.streams import streams_of

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_BLOCK_SIZE = {"cpu": 16, "cuda": 64}
"""Tokens per block by device. On a GPU a block is a span: one layer's chunk is one contiguous piece of the cache."""


class HCacheEngine(OneProcess, InferenceEngineV2):  # type: ignore[misc]
    """One model, or a rank's share of one, with its block pool. Engine thread only. Implements
    `runtime.ports.EngineAdapter`."""

    def __init__(self, policy: Any, engine_config: RaggedInferenceEngineConfig, kernels: str) -> None:
        self.group: RankGroup | None = policy.group
        super().__init__(policy, engine_config)
        self.kernels = kernels
        """What computes: one of `modules.REGISTRABLE`."""
        self.dtype: torch.dtype = self._model.activation_dtype.value
        self.device: torch.device = self.kv_cache(0).device
        self.block_size: int = self._model.attn.kv_block_size
        self.all_positions = torch.arange(
            self.blocks_for(self.max_context_tokens) * self.block_size, device=self.device
        )
        """Every position that a sequence's blocks may have, int64."""
        streams = streams_of(self.device)
        self._batch = StepBatch(engine_config.state_manager, streams, for_stock=kernels == "stock")

    def _initialize_tp_group(self) -> Any:
        """The host's group is one of one process: sums and gathers go through `RankGroup`."""
        if self.group is None:
            return super()._initialize_tp_group()
        if torch.cuda.is_available():
            torch.cuda.set_device(self.group.rank)
        return None

    @property
    def geometry(self) -> ModelGeometry:
        """Of the whole model, also where this engine holds a share."""
        return self._model.geometry  # type: ignore[no-any-return]

    @property
    def checkpoint_dir(self) -> str:
        """Directory of the weights."""
        return str(self._policy._checkpoint_engine._local_checkpoint_dir)

    @property
    def allocator(self) -> Any:
        """The pool's free list (`engine.blocks.BlockAllocator`)."""
        return self._state_manager._kv_cache._allocators[0]

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return int(self.kv_cache(0).shape[0])

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return int(self.allocator.free_blocks)

    @property
    def num_tracked(self) -> int:
        """Sequences that hold a tracking slot."""
        return int(self._state_manager.n_tracked_sequences)

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens of one ragged batch."""
        return int(self._config.state_manager.max_ragged_batch_size)

    @property
    def max_context_tokens(self) -> int:
        """Most tokens that one sequence can ever hold here."""
        return min(int(self._config.state_manager.max_context), self.num_blocks * self.block_size)

    @property
    def max_fill_tokens(self) -> int:
        """Most tokens that `KVTarget.fill` computes at a time."""
        return self.max_batch_tokens

    @property
    def max_tracked(self) -> int:
        """Most sequences that can hold a tracking slot."""
        return int(self._config.state_manager.max_tracked_sequences)

    @property
    def kv_pool(self) -> torch.Tensor:
        """`[num_layers, num_blocks, block_size, 2, num_kv_heads, head_size]`."""
        return self._state_manager._kv_cache._caches[0]  # type: ignore[no-any-return]

    def kv_cache(self, layer_idx: int) -> torch.Tensor:
        """`[num_blocks, block_size, 2, num_kv_heads, head_size]` of one layer."""
        return self._state_manager.get_cache(layer_idx)

    def sequence(self, uid: int) -> Any:
        """The host's descriptor of a live sequence."""
        sequence = self._state_manager.get_sequence(uid)
        if sequence is None:
            raise HCacheError(f"sequence {uid} is not live")
        return sequence

    def seen_tokens(self, uid: int) -> int:
        """Tokens whose K and V are in the sequence's blocks."""
        return int(self.sequence(uid).seen_tokens)

    def blocks_of(self, uid: int) -> int:
        """Blocks that the sequence holds; 0 when it is not live."""
        sequence = self._state_manager.get_sequence(uid)
        return 0 if sequence is None else int(sequence.cur_allocated_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def reserve(self, uid: int, num_tokens: int) -> None:
        """Make a sequence live with blocks for its first `num_tokens` tokens. Raises HCacheError, and changes nothing,
        when the pool is short (the host's own allocation would silently give fewer)."""
        missing = self._check_reserve(uid, num_tokens)
        sequence = self._state_manager.get_or_create_sequence(uid)
        if missing > 0:
            self._model.maybe_allocate_kv(sequence, num_tokens - sequence.seen_tokens)

    def _check_reserve(self, uid: int, num_tokens: int) -> int:
        """Blocks that are missing."""
        missing = self.blocks_for(num_tokens) - self.blocks_of(uid)
        if missing > self.num_free_blocks:
            raise HCacheError(f"{missing} blocks wanted, {self.num_free_blocks} of {self.num_blocks} are free")
        return missing

    def truncate(self, uid: int, num_tokens: int) -> None:
        """Forget a sequence's tokens from `num_tokens` on; its blocks stay. The host has no such call, hence the
        write to its private field."""
        self._check_truncate(uid, num_tokens)
        self.sequence(uid)._seen_tokens = num_tokens

    def _check_truncate(self, uid: int, num_tokens: int) -> None:
        num_seen = self.sequence(uid).seen_tokens
        if not 0 <= num_tokens <= num_seen:
            raise HCacheError(f"cannot truncate {num_seen} tokens to {num_tokens}")

    def evict(self, uid: int) -> None:
        """Free a sequence's blocks; unknown uids are ignored."""
        sequence = self._state_manager.get_sequence(uid)
        if sequence is None:
            return
        if self.kernels != "stock":
            # The host asks the device, and so waits for all that was launched; its own table has the same. DeepSpeed's
            # kernels read the device's, which may be written anew only when they are done with it.
            sequence.all_block_ids = lambda cache_group: held_blocks(sequence)
        self.flush(uid)

    def poison_free_blocks(self) -> None:
        """From now on free blocks hold NaN: whoever reads what was freed, or never written, gets logits that are not
        finite, and its request fails. For tests and for hunting corruption; costs a write per freed block."""
        cache = self.kv_pool

        def poison(blocks: list[int]) -> None:
            cache[:, sent(torch.tensor(blocks, dtype=torch.int64), self.device)] = float("nan")

        self.allocator.on_free = poison
        poison([block for block in range(self.num_blocks) if self.allocator.is_free(block)])

    def warm_up(self) -> None:
        """Have everything compiled now that Triton compiles at first use (seconds for each kernel), and not under the
        first requests: a step of one token and one of many, forgotten at once, and a row that is restored. The engine
        holds no sequence yet. Every rank of a group does so by itself, before rank 0 leads."""
        self._model.attn.warm_up(self.kv_cache(0))
        for num_tokens in (1, min(64, self.max_batch_tokens, self.max_context_tokens)):
            try:
                HCacheEngine.put(self, [0], token_tensors([[0] * num_tokens]))
                row = torch.zeros(1, self.geometry.hidden_size, dtype=self.dtype, device=self.device)
                SequenceBlocks(self, 0).project_hidden(0, 0, row)
            finally:
                HCacheEngine.evict(self, 0)

    def target(self, uid: int) -> SequenceBlocks:
        """The sequence's blocks as they are now."""
        return SequenceBlocks(self, uid)

    @torch.inference_mode()
    def put(
        self, batch_uids: Iterable[int], batch_tokens: Iterable[torch.Tensor], do_checks: bool = True
    ) -> torch.Tensor:
        """One forward over a ragged batch. Returns logits of each sequence's last token, `[num_sequences, vocab]`.

        Always checks first that the batch fits (the host's own check is broken, and without one it gives a sequence
        fewer blocks than it needs). Raises HCacheError, and runs nothing, when it does not.
        """
        uids, tokens = list(batch_uids), list(batch_tokens)
        self._check_put(uids, tokens)
        return super().put(uids, tokens, do_checks=False)

    def _check_put(self, uids: list[int], tokens: list[torch.Tensor]) -> None:
        result = self.can_schedule(uids, [token_ids.numel() for token_ids in tokens])
        if result is not SchedulingResult.Success:
            raise HCacheError(f"a ragged batch of {len(uids)} sequences cannot run: {result.name}")

    def fill(self, sequence: Any, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        """Compute K and V of a live sequence's tokens `[start, start + len(token_ids))` in layers `[0, num_layers)`;
        its blocks are reserved. `seen_tokens` stays what it was."""
        num_seen = sequence._seen_tokens
        sequence._seen_tokens = start  # the host has no other way to say where a batch's rows belong
        try:
            self._batch.clear()
            sequence.pre_forward(token_ids.numel())
            self._batch.insert_sequence(sequence, token_ids, do_checks=False)
            self._batch.finalize()
            self._model.prepare_batch(self._batch)
            self._model.fill(self._batch, num_layers)
        finally:
            sequence._seen_tokens, sequence._in_flight_tokens = num_seen, 0

    def can_schedule(self, uids: Iterable[int], lengths: Iterable[int]) -> SchedulingResult:
        limits = self._config.state_manager
        batch = list(zip(uids, lengths, strict=True))
        wanted_blocks = 0
        num_new = 0
        for uid, num_tokens in batch:
            sequence = self._state_manager.get_sequence(uid)
            num_seen = 0 if sequence is None else sequence.seen_tokens
            num_new += sequence is None
            wanted_blocks += max(0, self.blocks_for(num_seen + num_tokens) - self.blocks_of(uid))
        if len(batch) > limits.max_ragged_sequence_count:
            return SchedulingResult.BatchSequenceLimitExceeded
        if wanted_blocks > self.num_free_blocks:
            return SchedulingResult.KVCacheLimitExceeded
        if self.num_tracked + num_new > limits.max_tracked_sequences:
            return SchedulingResult.EngineSequenceLimitExceeded
        if sum(num_tokens for _, num_tokens in batch) > limits.max_ragged_batch_size:
            return SchedulingResult.BatchTokenLimitExceeded
        return SchedulingResult.Success


def build_engine(
    model_path: str,
    *,
    dtype: str = "auto",
    num_blocks: int | None = None,
    block_size: int | None = None,
    kernels: str = "auto",
    max_batch_tokens: int = 768,
    max_sequences: int = 256,
    max_context_tokens: int | None = None,
    group: RankGroup | None = None,
    engine_class: type[HCacheEngine] = HCacheEngine,
) -> HCacheEngine:
    """Load a Hugging Face checkpoint (directory or hub id) into a ragged engine; with a `group`, this rank's share of
    it, and every rank calls with the same settings.

    `block_size` None: what suits the device. `kernels`: see `modules.register`; an engine keeps what it was built with,
    also when the next one is built with others.

    Raises UnsupportedModelError when the model cannot be served right, ConfigError for settings that do not fit it.
    """
    from mii_hcache.engine import compat, modules

    compat.install()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    block_size = block_size or DEFAULT_BLOCK_SIZE[device_type]
    kernels = modules.register(kernels, device_type, block_size=block_size)
    from mii_hcache.engine.families import policy_for

    checkpoint = open_checkpoint(model_path)
    config = checkpoint.model_config
    config.dtype = _pick_dtype(dtype, getattr(config, "dtype", None))
    model_tokens = int(config.max_position_embeddings)
    if max_context_tokens is not None and max_context_tokens > model_tokens:
        raise ConfigError(f"max_context_tokens is {max_context_tokens}, the model's limit is {model_tokens}")
    max_context_tokens = max_context_tokens or model_tokens
    config.max_seq_length = max_context_tokens
    policy = policy_for(config, checkpoint, group)
    if kernels == "stock":
        if group is not None:
            raise ConfigError("kernels='stock' computes on one rank only: take kernels='portable'")
        block_size = stock_block_size(config, model_path, max_context_tokens, num_blocks)
    if num_blocks is None:
        num_blocks = default_num_blocks(config, block_size, max_context_tokens, kernels, group)
    engine_config = RaggedInferenceEngineConfig(
        state_manager={
            "max_tracked_sequences": max(max_sequences * 2, max_sequences + 8),
            "max_ragged_batch_size": max_batch_tokens,
            "max_ragged_sequence_count": min(max_sequences, max_batch_tokens),
            "max_context": max_context_tokens,
            "memory_config": {"mode": "allocate", "size": num_blocks},
        }
    )
    try:
        engine = engine_class(policy, engine_config, kernels)
    except (ValueError, AttributeError, AssertionError) as error:
        raise UnsupportedModelError(f"model {model_path!r} cannot be built: {error}") from error
    if kernels == "triton" and device_type == "cuda":
        engine.warm_up()
    return engine


def _pick_dtype(name: str, configured: Any) -> torch.dtype:
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}")
        return DTYPES[name]
    return configured if configured in DTYPES.values() else torch.float32


def token_tensors(batch: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Token ids as the engine takes them: int64 on the host."""
    return [torch.tensor(token_ids, dtype=torch.int64) for token_ids in batch]
