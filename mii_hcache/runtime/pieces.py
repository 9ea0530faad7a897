"""How large the pieces are that a restore is cut into, by where the engine computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What one restorer works with."""

    tile_spans: int
    """Most spans of a tile: the smaller, the finer the slices."""
    first_spans: int
    """Of the first tile, and what each one behind it may have more."""
    alone_fill_tokens: int
    """Most tokens that a forward fills at a time while nothing else runs."""
    shared_fill_tokens: int
    """The same while others decode."""
    num_readers: int
    """Tiles read at a time."""
    least_ahead: int
    """Tiles that a restore may read ahead, however many there are."""
    read_ahead_bytes: int
    """What may lie in host memory, read and not yet placed, of all restores together: enough for the reads to go on
    while a forward runs."""


HOST = Pieces(
    tile_spans=8,
    first_spans=8,
    alone_fill_tokens=256,
    shared_fill_tokens=64,
    num_readers=3,
    least_ahead=3,
    read_ahead_bytes=256 << 20,
)
"""On a CPU."""
DEVICE = Pieces(
    tile_spans=32,
    first_spans=4,
    alone_fill_tokens=2048,
    shared_fill_tokens=256,
    num_readers=8,
    least_ahead=1,
    read_ahead_bytes=512 << 20,
)
"""On a GPU; not measured on one yet. A tile of 2,048 tokens is copied and projected in a time against which a launch
is nothing, and what is projected from it still fits into the caches; a step that reads all weights anyway computes 256
tokens beside for little; more readers, for memory gives a copy's worth of bytes only to several threads. A reader takes
more than a millisecond to verify a whole tile, 5 % of a restore of 4,096 tokens, so the first ones are short."""


def pieces_on(device: torch.device) -> Pieces:
    """For an engine there."""
    return HOST if device.type == "cpu" else DEVICE
