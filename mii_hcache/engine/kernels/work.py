"""Who computes what of a step's attention: tiles of queries, each over a part of the keys that it sees.

Worked out on the host from lengths that the host knows anyway, so that no step waits for the device. A tile is a few
queries of one sequence with all query heads of one KV head. Where tiles are few and histories long (decode, and the
short prompt behind a restored history), a tile's keys are split over several programs, and a second kernel merges them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton

MIN_NARROW_KEYS, MIN_WIDE_KEYS = 256, 1024
"""Fewer keys in a program are not worth the merge, whose bytes grow with the tile."""
ITEM_FIELDS = 8
MERGE_FIELDS = 4


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """How large a tile is, and what computes it."""

    rows: int
    """Queries times heads, a power of two; rows that no query fills are masked."""
    keys: int
    """Keys of one turn of the loop, a power of two."""
    num_warps: int
    num_stages: int


def tile_shapes(*, group: int, head_size: int, element_bytes: int) -> tuple[TileShape, TileShape]:
    """For a step's tiles of few rows (decode) and of many. They fit the shared memory of the smallest GPU served
    (99 KiB, sm_89 and sm_120). Chosen by arithmetic, not by measuring: no GPU was at hand."""
    narrow_rows = max(16, triton.next_power_of_2(group))
    head = triton.next_power_of_2(head_size)
    keys = max(16, min(64, 8192 * 2 // (head * element_bytes)))
    if head * element_bytes <= 256:
        wide = TileShape(rows=max(128, narrow_rows), keys=keys, num_warps=8, num_stages=2)
    else:
        wide = TileShape(rows=max(64, narrow_rows), keys=max(16, keys // 2), num_warps=8, num_stages=2)
    return TileShape(rows=narrow_rows, keys=keys, num_warps=4, num_stages=2), wide


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kind of tile of a step. Int32, on the host until they are sent."""

    items: torch.Tensor
    """`[num_items, 8]`: first row in the batch, its position, queries, first key, key behind the last, sequence, place
    of the partial result (-1: the whole), 0."""
    merges: torch.Tensor
    """`[num_merges, 4]`: first row in the batch, queries, first partial result, number of them."""
    num_partials: int


def plan_work(
    descriptors: Sequence[tuple[int, int, int]],
    *,
    narrow: TileShape,
    wide: TileShape,
    group: int,
    num_kv_heads: int,
    num_programs: int,
    window: int | None,
) -> tuple[Work, Work]:
    """The narrow and the wide tiles of a ragged batch. `descriptors[i]`: first row, tokens, seen tokens;
    `num_programs`: how many programs keep the device busy."""
    tiles: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])
    for sequence, (start, num_tokens, num_seen) in enumerate(descriptors):
        is_wide = num_tokens * group > narrow.rows
        queries = (wide if is_wide else narrow).rows // group
        for first in range(0, num_tokens, queries):
            count = min(queries, num_tokens - first)
            position = num_seen + first
            first_key = 0 if window is None else max(0, position + 1 - window)
            tiles[is_wide].append((start + first, position, count, first_key, position + count, sequence))
    num_keys = sum(tile[4] - tile[3] for kind in tiles for tile in kind)
    share = -(-num_keys * num_kv_heads // num_programs)
    return (
        _split(tiles[0], narrow.keys, max(MIN_NARROW_KEYS, share)),
        _split(tiles[1], wide.keys, max(MIN_WIDE_KEYS, share)),
    )


def _split(tiles: list[tuple[int, ...]], keys: int, share: int) -> Work:
    """Split each tile's keys into parts of about `share`, cut at multiples of `keys`, as even as may be."""
    items: list[tuple[int, ...]] = []
    merges: list[tuple[int, ...]] = []
    num_partials = 0
    for row, position, count, first_key, last_key, sequence in tiles:
        first_turn, last_turn = first_key // keys, -(-last_key // keys)
        turns = last_turn - first_turn
        parts = min(turns, -(-turns * keys // share))
        if parts == 1:
            items.append((row, position, count, first_turn * keys, last_key, sequence, -1, 0))
            continue
        merges.append((row, count, num_partials, parts))
        for part in range(parts):
            begin = first_turn + turns * part // parts
            end = first_turn + turns * (part + 1) // parts
            items.append((row, position, count, begin * keys, min(end * keys, last_key), sequence, num_partials, 0))
            num_partials += 1
    return Work(
        items=torch.from_numpy(np.array(items, dtype=np.int32).reshape(-1, ITEM_FIELDS)),
        merges=torch.from_numpy(np.array(merges, dtype=np.int32).reshape(-1, MERGE_FIELDS)),
        num_partials=num_partials,
    )
