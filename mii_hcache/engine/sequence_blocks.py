"""Where one live sequence's K and V lie in the block pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mii_hcache.engine.modules.batch_plan import runs_of, token_slots
from mii_hcache.errors import HCacheError
from mii_hcache.runtime.streams import Stream

if TYPE_CHECKING:
    from mii_hcache.engine.ragged_engine import HCacheEngine


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor's values on the device, without waiting for it."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def held_blocks(sequence: Any) -> torch.Tensor:
    """`[num_blocks]`, int32, on the host: blocks that a sequence (the host's descriptor) holds, in order."""
    ids: torch.Tensor = sequence.kv_cache_ids(on_device=False)
    return ids[0, : sequence.cur_allocated_blocks]


class SequenceBlocks:
    """The blocks of one sequence by absolute position (`runtime.ports.KVTarget`)."""

    def __init__(self, engine: HCacheEngine, uid: int) -> None:
        self._engine = engine
        self._model = engine.model()
        sequence = engine.sequence(uid)
        self._sequence = sequence
        self._block_ids = held_blocks(sequence).to(torch.int64)

    @cached_property
    def _all_slots(self) -> torch.Tensor:
        """Row in the cache of every token, on the device. Not for saving, which asks in the middle of decoding for one
        span of what may be a long sequence."""
        positions = torch.arange(self._block_ids.numel() * self._engine.block_size)
        return sent(token_slots(self._block_ids, positions, self._engine.block_size), self._engine.device)

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """Runs of neighbouring rows in the cache: first row and length."""
        size = self._engine.block_size
        return [(block * size, count * size) for block, count in runs_of(self._block_ids)]

    def _slots(self, start: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and rows in the cache: views of what was made once, for every tile of every layer."""
        stop = start + num_tokens
        return self._engine.all_positions[start:stop], self._all_slots[start:stop]

    def _row_runs(self, start: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """The rows of `[start, start + num_tokens)` as runs of neighbours: first token (from `start`), first row,
        length."""
        at, stop = 0, start + num_tokens
        for first_row, num_rows in self._runs:
            first, last = max(start, at), min(stop, at + num_rows)
            if first < last:
                yield first - start, first_row + first - at, last - first
            at += num_rows

    def _rows(self, layer_idx: int) -> torch.Tensor:
        cache = self._engine.kv_cache(layer_idx)
        return cache.view(-1, *cache.shape[2:])

    def prepare(self) -> None:
        _ = self._all_slots

    @torch.inference_mode()
    def fill(self, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        if num_layers > 1:
            self._engine.fill(self._sequence, start, token_ids, num_layers)
            return
        positions, slots = self._slots(start, token_ids.numel())
        hidden = self._model.first_hidden(sent(token_ids, positions.device), positions)
        self._model.restore_kv(0, hidden, positions, slots)

    @torch.inference_mode()
    def project_hidden(self, layer_idx: int, start: int, hidden: torch.Tensor) -> None:
        positions, slots = self._slots(start, hidden.shape[0])
        self._model.restore_kv(layer_idx, hidden, positions, slots)

    @torch.inference_mode()
    def write_kv(self, layer_idx: int, start: int, kv: torch.Tensor, stream: Stream) -> None:
        rows = self._rows(layer_idx)
        runs = self._row_runs(start, kv.shape[0])
        stream.copy_many([(rows[row : row + count], kv[token : token + count]) for token, row, count in runs])

    @torch.inference_mode()
    def read_kv(self, layer_idx: int, start: int, out: torch.Tensor) -> None:
        _, slots = self._slots(start, out.shape[0])
        out.copy_(self._rows(layer_idx)[slots], non_blocking=True)

    @torch.inference_mode()
    def gather_kv(self, layers: Sequence[int], start: int, out: torch.Tensor) -> None:
        size, stop = self._engine.block_size, start + out.shape[1]
        pool = self._engine.kv_pool
        rows = pool.view(pool.shape[0], -1, *pool.shape[3:])
        first_layer = 0
        while first_layer < len(layers):  # a copy for all layers that follow each other, and blocks that do
            end = first_layer + 1
            while end < len(layers) and layers[end] == layers[end - 1] + 1:
                end += 1
            source, target = rows[layers[first_layer] : layers[end - 1] + 1], out[first_layer:end]
            at = start // size * size
            for block, count in runs_of(self._block_ids[at // size : -(-stop // size)]):
                first, last = max(start, at), min(stop, at + count * size)
                row = block * size + first - at
                target[:, first - start : last - start].copy_(source[:, row : row + last - first])
                at += count * size
            first_layer = end

    def commit(self, num_tokens: int) -> None:
        self._check_commit()
        self._sequence.pre_forward(num_tokens)
        self._sequence.post_forward()

    def _check_commit(self) -> None:
        if self._sequence.seen_tokens != 0:
            raise HCacheError(f"a restored sequence has {self._sequence.seen_tokens} tokens already")
