"""Rows of a tile where a store has them: as addresses for who copies by those, as tensors for all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch


class LentRows(Sequence[torch.Tensor]):
    """Pieces of equal shape, contiguous, on the host. Each is made a tensor when it is asked for: that takes longer
    than to copy it by its address, and a restore has tens of thousands. Valid for as long as what was lent."""

    def __init__(
        self, chunks: Sequence[memoryview], addresses: Sequence[int], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        """`chunks`: bytes of pieces of that dtype and shape; `addresses`: where they begin."""
        self._chunks = chunks
        self.addresses = addresses
        self.dtype = dtype
        self.shape = shape
        """Of each piece."""
        self.piece_bytes = math.prod(shape) * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return len(self.addresses) * self.piece_bytes

    def shaped(self, *shape: int) -> LentRows:
        """The same bytes as pieces of another shape."""
        return LentRows(self._chunks, self.addresses, self.dtype, shape)

    def __len__(self) -> int:
        return len(self.addresses)

    @overload
    def __getitem__(self, idx: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, idx: slice) -> LentRows: ...
    def __getitem__(self, idx: int | slice) -> torch.Tensor | LentRows:
        if isinstance(idx, slice):
            return LentRows(self._chunks[idx], self.addresses[idx], self.dtype, self.shape)
        return torch.frombuffer(self._chunks[idx], dtype=self.dtype).view(self.shape)
