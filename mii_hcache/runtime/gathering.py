"""How hidden rows that several ranks have read come together on each of them: gathered, and put in order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.runtime.peers import GatherRows
from mii_hcache.runtime.ports import EngineAdapter, KVTarget
from mii_hcache.runtime.share import Share
from mii_hcache.runtime.streams import Stream, streams_of
from mii_hcache.runtime.work import Tile


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """A rank's place among those that gather. Engine thread; all ranks launch the same tiles in the same order."""

    share: Share
    gather: GatherRows

    def num_gathered(self, num_tokens: int) -> int:
        """Rows that are gathered for a tile of so many tokens: some ranks have a span less than others, and send what
        means nothing in its place."""
        return self.share.num_ranks * num_own_spans(self.share, num_tokens // SPAN_TOKENS) * SPAN_TOKENS

    def launch(
        self, stream: Stream, own: torch.Tensor, first_span: int, gathered: torch.Tensor, ordered: torch.Tensor
    ) -> None:
        """Launch on `stream` what brings the rows of a tile that begins at span `first_span` into `ordered`, in the
        order of their tokens, and behind them what means nothing.

        own: rows of this rank, `[n, hidden_size]`; gathered, ordered: `[num_ranks * n, hidden_size]`, contiguous, of
        the same dtype, on the engine's device. `own` and `gathered` are used until `stream` is done with this.
        """
        stream.launch(partial(self.gather, gathered, own))
        # Of the spans that a tile has, rank r has those at (r - first_span) mod N, one of N, so they lie as a matrix
        # whose columns are to be turned: two copies, and no table of indexes.
        num_ranks = self.share.num_ranks
        source = gathered.view(num_ranks, -1, SPAN_TOKENS * own.shape[1]).transpose(0, 1)
        target = ordered.view(-1, num_ranks, SPAN_TOKENS * own.shape[1])
        first_rank = first_span % num_ranks
        stream.copy(target[:, : num_ranks - first_rank], source[:, first_rank:])
        if first_rank:
            stream.copy(target[:, num_ranks - first_rank :], source[:, :first_rank])


def positions_of(share: Share, tile: Tile) -> range:
    """Which spans of a tile, counted from its first, a rank reads."""
    if tile.kind is ChunkKind.KV:
        return range(tile.num_spans)
    return range((share.rank - tile.first_span) % share.num_ranks, tile.num_spans, share.num_ranks)


def num_own_spans(share: Share, num_spans: int) -> int:
    """Most spans of hidden rows that one rank reads of a tile of so many."""
    return -(-num_spans // share.num_ranks)


def part_bytes(share: Share, geometry: ModelGeometry, kind: ChunkKind) -> int:
    """Bytes of one chunk that a rank reads."""
    return geometry.chunk_bytes(kind) if kind is ChunkKind.HIDDEN else geometry.kv_shard_bytes(share.num_ranks)


# --- measuring --------------------------------------------------------------------------------------------------------


def place_now(adapter: EngineAdapter, target: KVTarget, gathering: Gathering, tile: Tile, buffer: torch.Tensor) -> None:
    """Do by itself, on the engine's own stream, what brings a tile into this rank's blocks; all ranks call it in the
    same order. `buffer`: as of `rubbish`. Returns when the device is done with the buffer."""
    start, num_tokens = tile.first_span * SPAN_TOKENS, tile.num_spans * SPAN_TOKENS
    geometry, main = adapter.geometry, streams_of(adapter.device).main
    if tile.kind is ChunkKind.KV:
        heads = geometry.shard_kv_heads(gathering.share.num_ranks)
        num_bytes = tile.num_spans * part_bytes(gathering.share, geometry, ChunkKind.KV)
        rows = buffer[:num_bytes].to(adapter.device, non_blocking=True).view(adapter.dtype)
        target.write_kv(tile.layer_idx, start, rows.view(num_tokens, 2, heads, geometry.head_size), main)
    else:
        ordered = gather_now(adapter, gathering, tile.num_spans, buffer, first_span=tile.first_span)
        target.project_hidden(tile.layer_idx, start, ordered[:num_tokens])
    if adapter.device.type == "cuda":
        torch.cuda.current_stream(adapter.device).synchronize()


def gather_now(
    adapter: EngineAdapter, gathering: Gathering, num_spans: int, buffer: torch.Tensor, *, first_span: int = 0
) -> torch.Tensor:
    """Launch, on the engine's own stream, the gathering of a tile, whose rows are returned: see `Gathering.launch`."""
    num_bytes = num_own_spans(gathering.share, num_spans) * adapter.geometry.chunk_bytes(ChunkKind.HIDDEN)
    own = buffer[:num_bytes].to(adapter.device, non_blocking=True).view(adapter.dtype)
    own = own.view(-1, adapter.geometry.hidden_size)
    gathered = own.new_empty(gathering.num_gathered(num_spans * SPAN_TOKENS), own.shape[1])
    ordered = torch.empty_like(gathered)
    gathering.launch(streams_of(adapter.device).main, own, first_span, gathered, ordered)
    return ordered


def rubbish(share: Share, geometry: ModelGeometry, num_spans: int) -> torch.Tensor:
    """A host buffer for `place_now` of either kind: zeros."""
    num_bytes = num_spans * max(part_bytes(share, geometry, kind) for kind in ChunkKind)
    return torch.zeros(num_bytes, dtype=torch.uint8)
