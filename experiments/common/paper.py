"""The paper's published series as rows. They are facts to compare with, read off its figures to 1-2 %."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.common.rows import Row

SERIES_FILE = Path(__file__).parent / "paper_series.json"


@lru_cache(maxsize=1)
def _published() -> dict[str, Any]:
    return json.loads(SERIES_FILE.read_text(encoding="utf-8"))


def paper_rows(figure: str) -> list[Row]:
    """Every published number of an item, in the file's order; none for a drawn diagram."""
    source = _published()["source"]
    return [
        Row(
            figure=figure,
            panel=series["panel"],
            series=series["series"],
            x=x,
            y=y,
            unit=series["unit"],
            how="paper",
            machine=source["machine"],
            note=series.get("note", source["how"]),
        )
        for series in _published()["series"]
        if series["figure"] == figure
        for x, y in series["points"]
    ]


def paper_value(figure: str, panel: str, series: str, x: float | str) -> float:
    """One published number. Raises KeyError when there is none."""
    for row in paper_rows(figure):
        if (row.panel, row.series, row.x) == (panel, series, x) and row.y is not None:
            return row.y
    raise KeyError(f"the paper has no {figure}{panel} {series} at {x}")


def paper_points(figure: str, panel: str, series: str) -> list[tuple[Any, float]]:
    """One published series."""
    return [
        (row.x, row.y) for row in paper_rows(figure) if (row.panel, row.series) == (panel, series) and row.y is not None
    ]
