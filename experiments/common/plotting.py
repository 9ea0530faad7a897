"""Plots: the paper's numbers, ours, and the difference, side by side. Needs matplotlib; nothing else here does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.here import comparable, paper_comparable
from experiments.common.item import Item, Panel, matches
from experiments.common.rows import Row

STYLE: Mapping[str, tuple[str, str, str]] = {
    "Recomputation": ("#D55E00", "o", ""),
    "KV Offload": ("#E69F00", "s", "//"),
    "HCache": ("#0072B2", "D", ""),
    "HCache-O": ("#56B4E9", "v", "\\\\"),
    "Naive Hybrid": ("#009E73", "^", ".."),
    "Ideal": ("#777777", "x", "xx"),
    "Cake": ("#CC79A7", "P", "--"),
    "Auto": ("#222222", "*", "oo"),
}
"""Colour (Okabe and Ito's, apart for the colour-blind), marker and hatch of a series."""
_OTHERS = (("#0072B2", "D", ""), ("#E69F00", "s", "//"), ("#009E73", "^", ".."), ("#CC79A7", "P", "--"))
MAX_BYTES = 200_000
_MOST_MARKERS = 40
_MOST_PERCENT = 200

pyplot.rcParams.update(
    {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.4, "svg.hashsalt": "0"}
)


def style_of(series: str, names: Sequence[str]) -> tuple[str, str, str]:
    """By name; series that the paper's methods do not include take turns."""
    return STYLE.get(series) or _OTHERS[names.index(series) % len(_OTHERS)]


def _names(rows: Sequence[Row]) -> list[str]:
    known = list(STYLE)
    names = list(dict.fromkeys(row.series for row in rows))
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def draw_points(axes: Axes, panel: Panel, points: Mapping[str, Mapping[Any, float]], names: Sequence[str]) -> None:
    """Bars, or lines where the panel has them: y by x by series, in the unit of the panel's label."""
    if panel.is_line:
        for series, values in points.items():
            colour, marker, _ = style_of(series, names)
            marker = marker if len(values) <= _MOST_MARKERS else ""
            axes.plot(list(values), list(values.values()), color=colour, marker=marker, markersize=3, linewidth=1)
        return
    places = list(dict.fromkeys(x for values in points.values() for x in values))
    width = 0.8 / max(1, len(points))
    for order, (series, values) in enumerate(points.items()):
        colour, _, hatch = style_of(series, names)
        left = [places.index(x) - 0.4 + (order + 0.5) * width for x in values]
        axes.bar(left, list(values.values()), width, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
    axes.set_xticks(range(len(places)), [str(x) for x in places])
    num_letters = sum(len(str(x)) for x in places)
    if num_letters > 100:
        axes.set_xticks(range(len(places)), [str(x) for x in places], rotation=35, ha="right", fontsize=6)
    elif num_letters > 30:
        axes.tick_params(axis="x", rotation=20)


def _points(rows: Sequence[Row], factor: float) -> dict[str, dict[Any, float]]:
    found: dict[str, dict[Any, float]] = {series: {} for series in _names(rows)}
    for row in rows:
        if row.y is not None:
            found[row.series][row.x] = row.y * factor
    return {series: values for series, values in found.items() if values}


def side_by_side(item: Item, ours: Sequence[Row]) -> dict[str, Figure]:
    """Images by name: a row of three for each panel."""
    paper, ours = paper_comparable(item), comparable(item, ours)
    images: dict[str, list[Panel]] = {}
    for panel in item.panels:
        images.setdefault(panel.image or item.folder, []).append(panel)
    return {name: _image(item, panels, paper, ours) for name, panels in images.items()}


def _image(item: Item, panels: Sequence[Panel], paper: Sequence[Row], ours: Sequence[Row]) -> Figure:
    keys = {panel.key for panel in panels}
    names = _names([row for row in (*paper, *ours) if row.panel in keys and row.y is not None])
    figure, grid = pyplot.subplots(
        len(panels), 3, figsize=(10, 2.1 * len(panels) + 0.9), squeeze=False, layout="constrained"
    )
    for panel, row in zip(panels, grid, strict=True):
        _panel_row(row, panel, [r for r in paper if r.panel == panel.key], [r for r in ours if r.panel == panel.key])
        _difference(row[2], panel, paper, ours, names)
        for axes, rows in zip(row, (paper, ours), strict=False):
            factor = panel.y_factor if panel.here_of is None else 1.0
            draw_points(axes, panel, _points([r for r in rows if r.panel == panel.key], factor), names)
            if panel.log_y and axes.has_data():
                axes.set_yscale("log")
        _same_scale(row[0], row[1])
    if len(names) > 1:
        lines = {panel.key for panel in panels if panel.is_line}
        in_lines = {row.series for row in (*paper, *ours) if row.panel in lines}
        handles = [_handle(series, names, series in in_lines) for series in names]
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(item.title, fontsize=9)
    return figure


def _handle(series: str, names: Sequence[str], is_line: bool) -> Any:
    colour, marker, hatch = style_of(series, names)
    if is_line:
        return pyplot.Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1)
    return pyplot.Rectangle((0, 0), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white")


def _panel_row(row: Sequence[Axes], panel: Panel, paper: Sequence[Row], ours: Sequence[Row]) -> None:
    how = ", ".join(dict.fromkeys(r.how for r in ours if r.y is not None))
    name = panel.key.removesuffix("here").removesuffix("-")
    label = f"({name}) {panel.title}" if name else panel.title
    row[0].set_title(f"{label}: paper", fontsize=8, loc="left")
    row[1].set_title(f"ours, {how}" if how else "ours", fontsize=8, loc="left")
    row[2].set_title("difference, % of the paper's", fontsize=8, loc="left")
    for axes in row:
        axes.set_xlabel(panel.x_label)
    row[0].set_ylabel(panel.y_label if panel.here_of is None else f"{panel.relative_to} = 1, less is better")
    missing = {0: not paper, 1: not how, 2: not paper or not how}
    for idx, is_missing in missing.items():
        if is_missing:
            text = "no numbers published" if idx != 1 and not paper else "not yet measured"
            row[idx].text(0.5, 0.5, text, ha="center", va="center", transform=row[idx].transAxes, color="#777777")
            row[idx].set_xticks([])
            row[idx].set_yticks([])


def _difference(axes: Axes, panel: Panel, paper: Sequence[Row], ours: Sequence[Row], names: Sequence[str]) -> None:
    found: dict[str, dict[Any, float]] = {}
    for match in matches(paper, [row for row in ours if row.panel == panel.key]):
        found.setdefault(match.series, {})[match.x] = 100 * match.difference
    if found:
        ordered = {series: found[series] for series in names if series in found}
        draw_points(axes, panel, ordered, names)
        axes.axhline(0, color="#777777", linewidth=0.8)
        if axes.get_ylim()[1] > _MOST_PERCENT:
            axes.set_ylim(-100, _MOST_PERCENT)
            axes.set_title(f"{axes.get_title(loc='left')} (cut at {_MOST_PERCENT})", fontsize=8, loc="left")


def _same_scale(one: Axes, other: Axes) -> None:
    if one.has_data() and other.has_data() and one.get_yticks().size and other.get_yticks().size:
        low = min(one.get_ylim()[0], other.get_ylim()[0])
        high = max(one.get_ylim()[1], other.get_ylim()[1])
        one.set_ylim(low, high)
        other.set_ylim(low, high)


def save(images: Mapping[str, Figure], folder: Path) -> list[Path]:
    """PNG files, each under 200 KB. Closes the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in images.items():
        path = folder / f"{name}.png"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a label that does not fit is a broken plot
            figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} must be below {MAX_BYTES} bytes, got {path.stat().st_size}")
        written.append(path)
    return written
