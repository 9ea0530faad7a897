"""What `runtime.profiler` measures with where several ranks hold a model: all of them do each piece, as restores do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime.gathering import Gathering, gather_now, place_now, rubbish
from mii_hcache.runtime.peers import ForgetPart, GatherRows, GatherRubbish, Peers, PlaceRubbish, ReadPart
from mii_hcache.runtime.ports import EngineAdapter, KVTarget
from mii_hcache.runtime.profiler import TILE_TOKENS
from mii_hcache.runtime.sharded_tiles import next_read_id
from mii_hcache.runtime.share import Share
from mii_hcache.runtime.streams import Stream
from mii_hcache.runtime.work import Tile
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.directions import ChunkWanted, ReadDirections
from mii_hcache.storage.passing import PassingStore
from mii_hcache.storage.records import ChunkRead, ReadOutcome

_REPEATS = 9
_TILE_SPANS = TILE_TOKENS // SPAN_TOKENS


class RanksTarget(KVTarget):
    """Blocks of one sequence on all ranks, into which all of them place what means nothing. Engine thread of rank 0."""

    def __init__(self, *, adapter: EngineAdapter, target: KVTarget, uid: int, peers: Peers, gather: GatherRows) -> None:
        """`adapter`: of rank 0's own share. `target` fills all ranks' blocks."""
        self._adapter = adapter
        self._target = target
        self._uid = uid
        self._peers = peers
        self._gathering = Gathering(share=Share(rank=0, num_ranks=peers.num_ranks), gather=gather)
        self._buffer = rubbish(self._gathering.share, adapter.geometry, _TILE_SPANS)

    def fill(self, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        self._target.fill(start, token_ids, num_layers)

    def project_hidden(self, layer_idx: int, start: int, hidden: torch.Tensor) -> None:
        self._place(layer_idx, hidden.shape[0], ChunkKind.HIDDEN)

    def write_kv(self, layer_idx: int, start: int, kv: torch.Tensor, stream: Stream) -> None:
        self._place(layer_idx, kv.shape[0], ChunkKind.KV)

    def prepare(self) -> None:
        self._target.prepare()

    def gather_kv(self, layers: Sequence[int], start: int, out: torch.Tensor) -> None:
        raise NotImplementedError("not measured")

    def read_kv(self, layer_idx: int, start: int, out: torch.Tensor) -> None:
        raise NotImplementedError("not measured")

    def commit(self, num_tokens: int) -> None:
        raise NotImplementedError("not measured")

    def _place(self, layer_idx: int, num_tokens: int, kind: ChunkKind) -> None:
        num_spans = num_tokens // SPAN_TOKENS
        self._peers.order(PlaceRubbish(uid=self._uid, layer_idx=layer_idx, num_spans=num_spans, kind=kind))
        tile = Tile(layer_idx=layer_idx, first_span=0, num_spans=num_spans, kind=kind)
        own = self._adapter.target(self._uid)
        place_now(self._adapter, own, self._gathering, tile, self._buffer)

    def gather_s(self) -> float:
        """Seconds per token that gathering a tile takes: the least of a few."""
        times_s = []
        for _ in range(_REPEATS):
            self._settle()
            started_s = time.perf_counter()
            self._peers.order(GatherRubbish(num_spans=_TILE_SPANS))
            gather_now(self._adapter, self._gathering, _TILE_SPANS, self._buffer)
            self._settle()
            times_s.append(time.perf_counter() - started_s)
        return min(times_s) / (_TILE_SPANS * SPAN_TOKENS)

    def _settle(self) -> None:
        if self._adapter.device.type == "cuda":
            torch.cuda.synchronize(self._adapter.device)

    def with_gather(self, costs: dict[str, LayerCost]) -> dict[str, LayerCost]:
        """Costs that say how much of projecting is gathering."""
        gather_s = self.gather_s()
        return {tier: replace(cost, c_gather_s=min(gather_s, cost.c_hidden_s)) for tier, cost in costs.items()}


class RanksStore(PassingStore):
    """Reads by all ranks at once, a chunk each in turn, as from as many disks as they reach. For measuring: what the
    others read stays where it is."""

    def __init__(self, inner: ChunkStore, peers: Peers) -> None:
        """`inner` gives directions."""
        super().__init__(inner)
        self._peers = peers

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        asked: list[tuple[int, int, ReadDirections, Future[object]]] = []
        num_ranks = self._peers.num_ranks
        for rank in range(1, num_ranks):
            wanted = [
                ChunkWanted(
                    span_id=read.span_id,
                    layer_idx=read.layer_idx,
                    num_bytes=read.out.nbytes,
                    kind=read.kind,
                    shard=read.shard,
                    num_shards=read.num_shards,
                )
                for read in reads[rank::num_ranks]
            ]
            if not wanted:
                continue
            directions = self._inner.directions(wanted)
            assert directions is not None, "other processes cannot read this store"
            read_id = next_read_id()
            answer = self._peers.ask(rank, ReadPart(read_id=read_id, slots=directions.slots))
            asked.append((rank, read_id, directions, answer))
        outcome = self._inner.get_into(reads[::num_ranks])
        is_whole = outcome.num_ok == len(reads[::num_ranks])
        for rank, read_id, directions, answer in asked:
            theirs = answer.result()
            self._peers.ask(rank, ForgetPart(read_id=read_id))
            directions.end(theirs if isinstance(theirs, ReadOutcome) else ReadOutcome(num_ok=0))
            num_ok = theirs.num_ok if isinstance(theirs, ReadOutcome) else 0
            is_whole = is_whole and num_ok == len(reads[rank::num_ranks])
        return ReadOutcome(num_ok=len(reads)) if is_whole else ReadOutcome(num_ok=0, reason="missing")
