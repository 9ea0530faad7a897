"""What one token's state weighs in one layer of a model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mii_hcache.errors import ConfigError

SPAN_TOKENS = 64
"""Tokens per span, the unit that is named, saved, published and restored (the paper's chunk length, section 4.2)."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ChunkKind(str, Enum):
    """What the rows of a chunk are."""

    HIDDEN = "hidden"
    """Input of a layer's QKV projection, after its norm. Row: `[hidden_size]`. Layer 0 is never stored: its input is
    the embedding, recomputed from token ids."""
    KV = "kv"
    """Keys (rotated) and values as they lie in the blocks. Row: `[2, num_kv_heads, head_size]`. Every layer."""


@dataclass(frozen=True, kw_only=True)
class ModelGeometry:
    """The sizes of a decoder that decide bytes and FLOPs: of the whole model, also where ranks share it."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: str
    """Torch's name of the activation dtype: float32, bfloat16 or float16."""
    ffn_weights: int = 0
    """Weights of a layer's feed-forward part that one token uses; 0: unknown."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.ffn_weights < 0:
            raise ConfigError(f"ffn_weights must be >= 0, got {self.ffn_weights}")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")

    @property
    def shape(self) -> str:
        """In words, all that decides what a layer costs but its feed-forward part."""
        heads = f"{self.num_heads} heads and {self.num_kv_heads} KV heads of {self.head_size}"
        return f"{self.num_layers} layers of {self.hidden_size}, {heads}, {self.dtype}"

    @property
    def dtype_bytes(self) -> int:
        """Bytes per element."""
        return DTYPE_BYTES[self.dtype]

    def row_elements(self, kind: ChunkKind) -> int:
        """Elements of one token's row in one layer."""
        if kind is ChunkKind.HIDDEN:
            return self.hidden_size
        return 2 * self.num_kv_heads * self.head_size

    def row_bytes(self, kind: ChunkKind) -> int:
        """Bytes of one token's row in one layer."""
        return self.row_elements(kind) * self.dtype_bytes

    def saved_layers(self, kind: ChunkKind) -> range:
        """Layers that have a chunk of this kind, in order."""
        return range(1 if kind is ChunkKind.HIDDEN else 0, self.num_layers)

    def chunk_bytes(self, kind: ChunkKind) -> int:
        """Bytes of one chunk: `SPAN_TOKENS` rows of one layer."""
        return SPAN_TOKENS * self.row_bytes(kind)

    def shard_kv_heads(self, num_ranks: int) -> int:
        """KV heads that each of `num_ranks` ranks holds: its part of them, or one that several ranks hold when there
        are fewer heads than ranks. Raises ValueError when the heads cannot be shared evenly."""
        few, many = sorted((num_ranks, self.num_kv_heads))
        if few < 1 or many % few:
            raise ValueError(f"{num_ranks} ranks cannot share {self.num_kv_heads} KV heads evenly")
        return max(1, self.num_kv_heads // num_ranks)

    def kv_shard_bytes(self, num_ranks: int) -> int:
        """Bytes of one kv chunk of one of `num_ranks` ranks: rows `[2, shard_kv_heads, head_size]`."""
        return SPAN_TOKENS * 2 * self.shard_kv_heads(num_ranks) * self.head_size * self.dtype_bytes

    def span_bytes(self, kind: ChunkKind) -> int:
        """Bytes of all chunks of a span."""
        return len(self.saved_layers(kind)) * self.chunk_bytes(kind)

    def bytes_per_token(self, kind: ChunkKind) -> float:
        """Stored bytes per token of history."""
        return self.span_bytes(kind) / SPAN_TOKENS
