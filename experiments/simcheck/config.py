"""The simulator of figures 4, 9, 10 and 15 against the engine, on a machine that both can be asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from experiments.common.item import Item, Panel
from experiments.common.rows import Row

SERIES = ("Recomputation", "KV Offload", "HCache", "Ideal")
RESTORES = ("KV Offload", "HCache-O", "HCache", "Naive Hybrid", "Cake", "Auto")
_LOAD = "the paper's rounds/s"

PAIRS = {
    "first token, median": ("a", "b"),
    "first token, mean": ("c", "d"),
    "between tokens": ("e", "f"),
    "restore alone": ("g", "h"),
}
"""Panels of measured and of simulated numbers, by what they are."""


def _panels() -> tuple[Panel, ...]:
    made = []
    for what, keys in PAIRS.items():
        x_label = "tokens of history" if what == "restore alone" else _LOAD
        for key, how in zip(keys, ("measured", "simulated"), strict=True):
            made.append(Panel(key=key, title=f"{what}, {how}", x_label=x_label, y_label="s", is_line=True))
    return tuple(made)


ITEM = Item(
    folder="simcheck",
    title="Beyond the paper: how far the simulator is off",
    claim="simulated over measured on the machine at hand, for what the simulated figures say",
    how="the machine is profiled, and steps of the engine are timed; then a recorded load of conversations goes "
    "through a real server over HTTP and, with that profile and those steps, through the simulator. Nothing is fitted "
    "to what the server does under load. Restores alone: the simulator's plan against the real restore.",
    panels=_panels(),
    why="The simulator knows no saving, no HTTP and no client, which on a CPU share the cores with the engine; it "
    "sends whole layers where the restorer sends tiles, and restores one history at a time. A round's history ends a "
    "token earlier in the engine, as the last generated token has not run.",
)


@dataclass(frozen=True, kw_only=True)
class Error:
    """How far the simulated numbers of a kind are off, of the measured ones."""

    what: str
    typical: float
    """Median of the differences without their signs."""
    low: float
    """Least of simulated over measured, and with the next its range."""
    high: float
    count: int

    def __str__(self) -> str:
        return f"typically {self.typical:.0%} off; {self.low:.2f} to {self.high:.2f} of measured, {self.count} numbers"


def ratios(rows: Sequence[Row], what: str) -> dict[tuple[str, float | str], float]:
    """Simulated over measured, by series and x."""
    measured, simulated = (
        {(row.series, row.x): row.y for row in rows if row.panel == key and row.y is not None} for key in PAIRS[what]
    )
    return {place: simulated[place] / y for place, y in measured.items() if y and place in simulated}


def errors(rows: Sequence[Row]) -> list[Error]:
    """One for each kind that has numbers."""
    made = []
    for what in PAIRS:
        values = list(ratios(rows, what).values())
        if values:
            typical = median(abs(value - 1) for value in values)
            made.append(Error(what=what, typical=typical, low=min(values), high=max(values), count=len(values)))
    return made
