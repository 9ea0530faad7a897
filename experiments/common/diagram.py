"""Drawn diagrams: boxes with words and arrows between them. They have no numbers, and one row that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.common.item import Context, Item
from experiments.common.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"plain": "#EEEEEE", "compute": "#CCE5F2", "store": "#FBE3B5", "save": "#CDEBDD"}


@dataclass(frozen=True, kw_only=True)
class Box:
    """Around its middle, on a canvas of 100 by 50."""

    x: float
    y: float
    text: str
    role: str = "plain"
    """Of `COLOURS`."""
    width: float = 18.0
    height: float = 7.0


@dataclass(frozen=True, kw_only=True)
class Arrow:
    """From box to box, by their names, with a word beside it."""

    start: str
    stop: str
    text: str = ""
    is_dashed: bool = False


def rows_of(item: Item) -> Callable[[Context], Iterator[Row]]:
    """What such an item measures."""

    def measure(_: Context) -> Iterator[Row]:
        yield Row(
            figure=item.key, series="diagram", x="", y=None, unit="-", how="simulated", note="a diagram: no numbers"
        )

    return measure


def drawing_of(item: Item, boxes: dict[str, Box], arrows: Sequence[Arrow]) -> Callable[..., dict[str, Figure]]:
    """Draws it, whatever the rows."""

    def draw(_: Sequence[Row]) -> dict[str, Figure]:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        axes.set(xlim=(0, 100), ylim=(0, 50))
        axes.axis("off")
        figure.suptitle(item.title, fontsize=9)
        for box in boxes.values():
            corner = (box.x - box.width / 2, box.y - box.height / 2)
            patch = pyplot.Rectangle(corner, box.width, box.height, facecolor=COLOURS[box.role], edgecolor="#444444")
            axes.add_patch(patch)
            axes.text(box.x, box.y, box.text, ha="center", va="center", fontsize=8)
        for arrow in arrows:
            (start, stop), (at, to) = _ends(boxes[arrow.start], boxes[arrow.stop])
            style = {"arrowstyle": "->", "linestyle": "--" if arrow.is_dashed else "-", "color": "#444444"}
            axes.annotate("", xy=(at, to), xytext=(start, stop), arrowprops=style)
            place = {"ha": "center", "va": "bottom"} if stop == to else {"ha": "left", "va": "center"}
            falls = (at - start) * (to - stop) < 0  # the free side of the line is above it
            aside = (0.0, 0.6) if stop == to else (1.5, 0.9 if falls else -0.8)
            axes.text((start + at) / 2 + aside[0], (stop + to) / 2 + aside[1], arrow.text, fontsize=7, **place)
        return {item.folder: figure}

    return draw


def _ends(one: Box, other: Box) -> tuple[tuple[float, float], tuple[float, float]]:
    """Middles of the sides that face each other."""
    if abs(other.y - one.y) > (one.height + other.height) / 2:
        up = 1 if other.y > one.y else -1
        return (one.x, one.y + up * one.height / 2), (other.x, other.y - up * other.height / 2)
    right = 1 if other.x > one.x else -1
    return (one.x + right * one.width / 2, one.y), (other.x - right * other.width / 2, other.y)
