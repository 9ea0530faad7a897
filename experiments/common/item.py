"""What an item of the paper is: its panels, and what it claims. Comparing with the paper is arithmetic on rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from experiments.common.rows import Row

AGREES = 0.10
"""Largest difference, of the paper's number, that counts as agreeing; `partly` reaches to 2.5 times that."""

_Choice = TypeVar("_Choice")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of a figure: the paper's, ours and the difference are drawn side by side."""

    key: str = ""
    title: str
    x_label: str
    y_label: str
    y_factor: float = 1.0
    """From the rows' unit to that of `y_label`."""
    is_line: bool = False
    log_y: bool = False
    image: str = ""
    """Panels of one name share an image; the item's folder is its name when empty."""
    here_of: str | None = None
    """Of a panel that is run on the machine at hand: the paper's panel that it stands beside. Models and machines
    differ, so both are shown relative to `relative_to` at the same x."""
    relative_to: str = "HCache"
    is_speed: bool = False
    """y is a speed and not a time: more is better."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A claim about two series: the ratio of their values wherever both have one. `series@x` is one point of it."""

    text: str
    numerator: str
    denominator: str
    low: float
    high: float
    panels: tuple[str, ...] = ("",)
    tolerance: float = AGREES
    """Of the range's ends, that is forgiven."""
    why: str = ""
    """Where ours differs, and what is odd in the paper."""

    def ratios(self, rows: Sequence[Row]) -> list[float]:
        """Of these rows, paper's or ours."""
        above, below = (self._values(rows, name) for name in (self.numerator, self.denominator))
        return [value / below[place] for place, value in above.items() if place in below]

    def _values(self, rows: Sequence[Row], name: str) -> dict[tuple[str, Any], float]:
        """By panel and x; by panel alone for a single point."""
        series, _, point = name.partition("@")
        found = [row for row in rows if row.panel in self.panels and row.series == series and row.y]
        if point:
            return {(row.panel, None): row.y for row in found if str(row.x) == point and row.y}
        return {(row.panel, row.x): row.y for row in found if row.y}

    def verdict(self, rows: Sequence[Row]) -> str:
        """yes: all of ours lie in the paper's range, give or take the tolerance, and on its side of 1; partly: some
        do."""
        ratios = self.ratios(rows)
        if not ratios:
            return "not yet measured"
        least = max(self.low * (1 - self.tolerance), min(self.low, 1.0))
        inside = [least <= ratio <= self.high * (1 + self.tolerance) for ratio in ratios]
        return "yes" if all(inside) else "partly" if any(inside) else "no"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One figure or table."""

    folder: str
    title: str
    claim: str
    """What the paper says with it, in our words."""
    how: str
    """How our numbers were obtained, in a sentence."""
    here: str = ""
    """The same for what was run on the machine at hand; empty when nothing is."""
    panels: tuple[Panel, ...]
    checks: tuple[Check, ...] = ()
    why: str = ""
    """Where the numbers differ, and what is odd in the paper."""
    inputs: tuple[str, ...] = ()
    """Series that ours takes from the paper, all or in part: they agree by construction and do not count."""

    @property
    def key(self) -> str:
        """`fig11` of `fig11_sensitivity`; pages beyond the paper go by their whole name."""
        head = self.folder.split("_")[0]
        return head if head.startswith(("fig", "tab")) else self.folder

    @property
    def is_beyond(self) -> bool:
        """A page of ours, which the paper does not have."""
        return not self.key.startswith(("fig", "tab"))

    def is_reference(self, row: Row) -> bool:
        """Whether a row is what others of its panel are shown relative to: it agrees by construction."""
        of = {panel.key: panel.relative_to for panel in self.panels if panel.here_of is not None}
        return of.get(row.panel) == row.series

    def is_here(self, row: Row) -> bool:
        """Whether a row was run on the machine at hand, for a panel that says so."""
        return any(panel.key == row.panel and panel.here_of is not None for panel in self.panels)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a run is given."""

    scale: str
    data: Path | None = None

    def pick(self, *, smoke: _Choice, small: _Choice, paper: _Choice) -> _Choice:
        """What belongs to the scale."""
        choices: Mapping[str, _Choice] = {"smoke": smoke, "small": small, "paper": paper}
        return choices[self.scale]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A piece of a run on the machine at hand; pieces that are done are kept when a run is stopped."""

    key: str
    measure: Callable[[], Iterable[Row]]


@dataclass(frozen=True, kw_only=True)
class Match:
    """One number of ours beside the paper's."""

    panel: str
    series: str
    x: Any
    paper: float
    ours: float

    @property
    def difference(self) -> float:
        """Of the paper's number."""
        return self.ours / self.paper - 1


def matches(paper: Sequence[Row], ours: Sequence[Row]) -> Iterator[Match]:
    """Ours at its own x. Where x is a number the paper's is interpolated, but not beyond its ends (2 % is forgiven)."""
    published: dict[tuple[str, str], dict[Any, float]] = {}
    for row in paper:
        if row.y:
            published.setdefault((row.panel, row.series), {})[row.x] = row.y
    for row in ours:
        points = published.get((row.panel, row.series))
        value = _at(points, row.x) if points and row.y is not None else None
        if value and row.y is not None:
            yield Match(panel=row.panel, series=row.series, x=row.x, paper=value, ours=row.y)


def _at(points: Mapping[Any, float], x: Any) -> float | None:
    if x in points or isinstance(x, str) or any(isinstance(key, str) for key in points):
        return points.get(x)
    keys = sorted(points)
    if not 0.98 * keys[0] <= x <= 1.02 * keys[-1]:
        return None
    if len(keys) == 1:
        return points[keys[0]]
    upper = min(max(1, bisect_right(keys, x)), len(keys) - 1)
    low, high = keys[upper - 1], keys[upper]
    part = min(1.0, max(0.0, (x - low) / (high - low)))
    return points[low] + part * (points[high] - points[low])


def typical_difference(item: Item, paper: Sequence[Row], ours: Sequence[Row]) -> float | None:
    """Median of the differences without their signs, inputs left out; None when nothing matches."""
    differences = [abs(match.difference) for match in matches(paper, ours) if match.series not in item.inputs]
    return median(differences) if differences else None


def numbers_verdict(difference: float | None) -> str:
    """Of a typical difference."""
    if difference is None:
        return "not yet measured"
    return "yes" if difference <= AGREES else "partly" if difference <= 2.5 * AGREES else "no"
