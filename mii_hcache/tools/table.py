"""Plain text tables, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width; the first `left` ones are flush left, the others (numbers) flush right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[idx]) for row in cells) for idx in range(len(header))]
    lines = [
        "  ".join(f"{cell:<{width}}" if idx < left else f"{cell:>{width}}" for idx, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def size(num_bytes: float) -> str:
    """`1.5 GiB`."""
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << exponent:
            return f"{num_bytes / (1 << exponent):.1f} {unit}"
    return f"{num_bytes:.0f} B"
