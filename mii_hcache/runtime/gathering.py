"""How a tile that several ranks have read gets into their blocks: gathered, put in order, projected."""

from __future__ import annotations

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.runtime.peers import GatherRows
from mii_hcache.runtime.ports import EngineAdapter, KVTarget
from mii_hcache.runtime.share import Share
from mii_hcache.runtime.streams import streams_of
from mii_hcache.runtime.work import Tile


def positions_of(share: Share, tile: Tile) -> range:
    """Which spans of a tile, counted from its first, a rank reads."""
    if tile.kind is ChunkKind.KV:
        return range(tile.num_spans)
    return range((share.rank - tile.first_span) % share.num_ranks, tile.num_spans, share.num_ranks)


def part_bytes(share: Share, geometry: ModelGeometry, kind: ChunkKind) -> int:
    """Bytes of one chunk that a rank reads."""
    return geometry.chunk_bytes(kind) if kind is ChunkKind.HIDDEN else geometry.kv_shard_bytes(share.num_ranks)


def place_tile(
    adapter: EngineAdapter, target: KVTarget, share: Share, gather: GatherRows, tile: Tile, buffer: torch.Tensor
) -> None:
    """Launch what brings a tile into this rank's blocks; all ranks call it in the same order.

    buffer: `[num_bytes]`, uint8, host: this rank's chunks in order, with room for as many as any rank has. Engine
    thread. On a GPU it waits until the buffer is free again; that has not run yet.
    """
    start, num_tokens = tile.first_span * SPAN_TOKENS, tile.num_spans * SPAN_TOKENS
    chunk_bytes, dtype = part_bytes(share, adapter.geometry, tile.kind), adapter.dtype
    if tile.kind is ChunkKind.KV:
        rows = _on_device(adapter, buffer[: tile.num_spans * chunk_bytes])
        heads = adapter.geometry.shard_kv_heads(share.num_ranks)
        kv = rows.view(dtype).view(num_tokens, 2, heads, adapter.geometry.head_size)
        target.write_kv(tile.layer_idx, start, kv, streams_of(adapter.device).main)
    else:
        gathered = gather_spans(adapter, share, gather, tile.num_spans, buffer)
        order = torch.tensor(order_of(share.num_ranks, tile), device=gathered.device)
        target.project_hidden(tile.layer_idx, start, gathered[order].view(num_tokens, adapter.geometry.hidden_size))
    if adapter.device.type == "cuda":
        torch.cuda.current_stream().synchronize()  # the host buffer is reused as soon as this returns


def gather_spans(
    adapter: EngineAdapter, share: Share, gather: GatherRows, num_spans: int, buffer: torch.Tensor
) -> torch.Tensor:
    """Hidden rows of all ranks' spans, one rank behind the other: `[spans, row_elements * SPAN_TOKENS]`, one span more
    than some ranks have, which holds anything."""
    num_own = -(-num_spans // share.num_ranks)
    num_bytes = num_own * part_bytes(share, adapter.geometry, ChunkKind.HIDDEN)
    rows = _on_device(adapter, buffer[:num_bytes]).view(adapter.dtype).view(num_own, -1)
    gathered = rows.new_empty(share.num_ranks * num_own, rows.shape[1])
    gather(gathered, rows)
    return gathered


def rubbish(share: Share, geometry: ModelGeometry, num_spans: int) -> torch.Tensor:
    """A host buffer for `place_tile` of either kind: zeros."""
    num_bytes = num_spans * max(part_bytes(share, geometry, kind) for kind in ChunkKind)
    return torch.zeros(num_bytes, dtype=torch.uint8)


def order_of(num_ranks: int, tile: Tile) -> list[int]:
    """Where each span of a tile of hidden rows is, after every rank's were gathered one rank behind the other."""
    num_own = -(-tile.num_spans // num_ranks)
    return [
        (tile.first_span + position) % num_ranks * num_own + position // num_ranks for position in range(tile.num_spans)
    ]


def _on_device(adapter: EngineAdapter, host: torch.Tensor) -> torch.Tensor:
    return host.to(adapter.device, non_blocking=True)
