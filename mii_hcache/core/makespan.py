"""How long two resources that take turns need: reads that run ahead, and compute that follows them (paper, figure 5).

A *cell* is a tile of one layer: it is read, then computed on. Reads run one after the other in the cells' order; a
cell is computed when it has been read and the cell before it has been computed. This is the two-machine flow shop, and
every time in it is a longest path, so a row of cells is described by three numbers (`Flow`) that compose:

    A = all reads      B = all computing      X = longest path from the first read to the last computation
    one cell (a, b):   A = a   B = b   X = a + b
    first, then next:  A = A1 + A2   B = B1 + B2   X = max(X1 + B2, A1 + X2)

Thousands of equal cells cost no more than one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Cell(NamedTuple):
    """One tile of one layer."""

    io_s: float
    """Its read; 0 for work that waits for nothing, such as recomputation."""
    compute_s: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What a row of cells takes."""

    io_s: float
    """Time that the reads are busy."""
    compute_s: float
    """Time that computing is busy."""
    makespan_s: float
    """From the first start to the last end."""

    @property
    def bubble_s(self) -> float:
        """Time that the busier of the two idles. 0 is the "bubble-free" of the paper's section 4.1."""
        return max(0.0, self.makespan_s - max(self.io_s, self.compute_s))

    @property
    def bubble_fraction(self) -> float:
        """Share of the makespan that the busier of the two idles."""
        return self.bubble_s / self.makespan_s if self.makespan_s else 0.0


class Flow(NamedTuple):
    """A row of cells as its three numbers. Exact; associative under `then`."""

    io_s: float
    compute_s: float
    makespan_s: float

    @classmethod
    def of(cls, io_s: float, compute_s: float) -> Flow:
        """One cell."""
        return cls(io_s, compute_s, io_s + compute_s)

    def then(self, after: Flow) -> Flow:
        """This row, followed by another."""
        return Flow(
            self.io_s + after.io_s,
            self.compute_s + after.compute_s,
            max(self.makespan_s + after.compute_s, self.io_s + after.makespan_s),
        )

    def times(self, count: int) -> Flow:
        """This row, `count` times in a row: the longest path leaves the reads in the first or in the last of them."""
        if count <= 0:
            return NOTHING
        more = count - 1
        return Flow(
            count * self.io_s,
            count * self.compute_s,
            self.makespan_s + more * max(self.io_s, self.compute_s),
        )

    @property
    def timeline(self) -> Timeline:
        """The same numbers, named."""
        return Timeline(io_s=self.io_s, compute_s=self.compute_s, makespan_s=self.makespan_s)


NOTHING = Flow(0.0, 0.0, 0.0)


def makespan(cells: Iterable[Cell], *, max_ahead_cells: int | None = None) -> Timeline:
    """What the cells take, in their order.

    `max_ahead_cells`: buffers for cells that are being read or wait to be computed on; the next read starts when one
    is free. None: as many as needed. Cells without a read need none.
    """
    if max_ahead_cells is not None and max_ahead_cells < 1:
        raise ValueError(f"max_ahead_cells must be >= 1, got {max_ahead_cells}")
    io_s = compute_s = io_end_s = end_s = 0.0
    ends: deque[float] = deque(maxlen=max_ahead_cells)
    for cell in cells:
        if cell.io_s > 0 and max_ahead_cells is not None and len(ends) == max_ahead_cells:
            io_end_s = max(io_end_s, ends[0])
        io_end_s += cell.io_s
        end_s = max(end_s, io_end_s) + cell.compute_s
        if cell.io_s > 0:
            ends.append(end_s)
        io_s += cell.io_s
        compute_s += cell.compute_s
    return Timeline(io_s=io_s, compute_s=compute_s, makespan_s=end_s)
