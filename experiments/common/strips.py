"""Timelines as strips, reads above and computing below; figures 5 and 8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib import pyplot
from matplotlib.axes import Axes

from experiments.common.plotting import style_of
from experiments.common.rows import Row
from experiments.common.simulator import Interval

LIKE = {"hidden": "HCache", "kv": "KV Offload", "recompute": "Recomputation"}
"""Kinds take the colour of the method that is made of them."""
WORDS = ("from hidden states", "K and V", "recomputed")
"""Of `LIKE`, for a legend."""


def colour_of(kind: str) -> str:
    """Of cells and intervals."""
    return style_of(LIKE[kind], [])[0]


def draw_strip(axes: Axes, rows: Sequence[Row], longest_s: float, factor: float = 1e3) -> None:
    """One panel's rows (see `interval_rows`); `factor` from seconds to the axis's unit."""
    ours = {(row.series, row.x): row.y for row in rows if row.y is not None}
    for (series, x), start_s in ours.items():
        resource, kind, end = series.split()
        if end == "start":
            took_s = ours[f"{resource} {kind} stop", x] - start_s
            place = 1 if resource == "read" else 0
            colour = colour_of(kind)
            axes.barh(place, factor * took_s, left=factor * start_s, color=colour, edgecolor="white", linewidth=0.4)
    axes.set_yticks([0, 1], ["compute", "read"])
    axes.set_xlim(0, 1.02 * factor * longest_s)


def legend_handles(kinds: Sequence[str] = tuple(LIKE)) -> tuple[list[pyplot.Rectangle], list[str]]:
    """Handles and labels."""
    words = dict(zip(LIKE, WORDS, strict=True))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour_of(kind)) for kind in kinds]
    return handles, [words[kind] for kind in kinds]


def interval_points(intervals: Sequence[Interval]) -> Iterator[tuple[str, int, float]]:
    """(series, x, seconds): two for each interval, its start and its stop, x counting them."""
    for idx, one in enumerate(intervals):
        for end, seconds in (("start", one.start_s), ("stop", one.stop_s)):
            yield f"{one.resource} {one.kind} {end}", idx, seconds
