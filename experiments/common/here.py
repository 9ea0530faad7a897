"""Numbers of the machine at hand beside the paper's. Models and machines differ, so both are shown relative to one
method at the same x: how many times as long the others take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from experiments.common.item import Item, Panel
from experiments.common.paper import paper_rows
from experiments.common.rows import Row


def comparable(item: Item, rows: Sequence[Row]) -> list[Row]:
    """The rows of an item, those of its here-panels made relative; a point without the reference is left out."""
    here = {panel.key: panel for panel in item.panels if panel.here_of is not None}
    kept = [row for row in rows if row.panel not in here]
    for key, panel in here.items():
        kept += _relative([row for row in rows if row.panel == key], panel)
    return kept


def paper_absolute(item: Item) -> list[Row]:
    """The paper's rows, and once more under each here-panel those of the panel that it stands beside."""
    published = paper_rows(item.key)
    kept = list(published)
    for panel in item.panels:
        if panel.here_of is not None:
            kept += [replace(row, panel=panel.key) for row in published if row.panel == panel.here_of]
    return kept


def paper_comparable(item: Item) -> list[Row]:
    """`paper_absolute`, those under here-panels made relative."""
    return comparable(item, paper_absolute(item))


def _relative(rows: Sequence[Row], panel: Panel) -> list[Row]:
    reference = {row.x: row.y for row in rows if row.series == panel.relative_to and row.y}
    made = []
    for row in rows:
        base = reference.get(row.x)
        if row.y and base:
            times = base / row.y if panel.is_speed else row.y / base
            made.append(replace(row, y=times, unit="ratio"))
    return made
