"""What this should reach, and what was predicted before anything ran: both beside what was measured, whatever it says.

Predictions are of two kinds. `model` comes from a performance model of the restore alone, over assumed rates of an H200
(760 TFLOP/s products, 420 attention, 55 GB/s from the host): it knows no store and no host work. `engine` is what we
expect of this engine on that machine, written down before its first run; where it is worse, the README says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from experiments.common.rows import Row

LONG = 16384
FIRST = "llama2-7b"

PREDICTED_MS: dict[tuple[str, str, int], tuple[float, float]] = {
    (FIRST, "recompute", 1024): (20.5, 28),
    (FIRST, "kv", 1024): (10.1, 17),
    (FIRST, "hidden", 1024): (5.4, 10),
    (FIRST, "auto", 1024): (5.0, 10),
    (FIRST, "recompute", 4096): (86, 115),
    (FIRST, "kv", 4096): (39.4, 62),
    (FIRST, "hidden", 4096): (20, 33),
    (FIRST, "auto", 4096): (18.5, 31),
    (FIRST, "recompute", LONG): (468, 620),
    (FIRST, "kv", LONG): (157, 245),
    (FIRST, "hidden", LONG): (80.1, 125),
    (FIRST, "hcache", LONG): (77.7, 122),
    (FIRST, "cake", LONG): (109, 170),
    (FIRST, "auto", LONG): (73.8, 112),
    (FIRST, "recompute", 32768): (1270, 1700),
    (FIRST, "kv", 32768): (313, 490),
    (FIRST, "hidden", 32768): (160, 250),
    (FIRST, "auto", 32768): (147, 225),
    ("llama2-13b", "recompute", LONG): (842, 1100),
    ("llama2-13b", "kv", LONG): (245, 385),
    ("llama2-13b", "hidden", LONG): (125, 195),
    ("llama2-13b", "auto", LONG): (120, 185),
    ("llama3-8b", "recompute", LONG): (489, 650),
    ("llama3-8b", "kv", LONG): (39.4, 62),
    ("llama3-8b", "hidden", LONG): (78.9, 125),
    ("llama3-8b", "auto", LONG): (35.8, 57),
}
"""(model, method, tokens): (by the model, of the engine), milliseconds of a restore."""


class Numbers:
    """Rows by what they are of."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._values = {(row.panel, row.series, row.x): row.y for row in rows if row.y is not None}

    def get(self, panel: str, series: str, x: float | str) -> float | None:
        """None: not measured."""
        return self._values.get((panel, series, x))

    def ratio(self, above: tuple[str, str, float | str], below: tuple[str, str, float | str]) -> float | None:
        """None unless both were measured."""
        over, under = self.get(*above), self.get(*below)
        return None if over is None or not under else over / under

    def places(self, panel: str) -> list[tuple[str, float | str]]:
        """(series, x) that a panel has numbers of, in the order of the rows."""
        return [(series, x) for found, series, x in self._values if found == panel]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One target at one place."""

    target: str
    place: str
    value: float | None
    """None: not measured."""
    limit: float
    is_least: bool
    """Whether the value must be at least, not at most, the limit."""

    @property
    def word(self) -> str:
        """`met`, `missed` or `not yet measured`."""
        if self.value is None:
            return "not yet measured"
        is_met = self.value >= self.limit if self.is_least else self.value <= self.limit
        return "met" if is_met else "missed"


@dataclass(frozen=True, kw_only=True)
class _Target:
    text: str
    limit: float
    is_least: bool
    values: Callable[[Numbers], Iterator[tuple[str, float | None]]]


def _to_bound(method: str, models: Sequence[str]) -> Callable[[Numbers], Iterator[tuple[str, float | None]]]:
    def values(numbers: Numbers) -> Iterator[tuple[str, float | None]]:
        for model in models:
            series = f"{model} {method}"
            lengths = [x for name, x in numbers.places("restore") if name == series and isinstance(x, (int, float))]
            for x in [length for length in sorted(lengths) if length >= 4096] or [LONG]:
                yield (
                    f"{model}, {x:,.0f} tokens",
                    numbers.ratio(("restore", series, x), ("restore.bound", series, x)),
                )

    return values


def _over(stage: str, method: str) -> Callable[[Numbers], Iterator[tuple[str, float | None]]]:
    def values(numbers: Numbers) -> Iterator[tuple[str, float | None]]:
        above, below = (stage, f"{FIRST} {method}", LONG), (stage, f"{FIRST} auto", LONG)
        yield f"{FIRST}, {LONG:,} tokens", numbers.ratio(above, below)

    return values


def _saving(is_one: bool) -> Callable[[Numbers], Iterator[tuple[str, float | None]]]:
    def values(numbers: Numbers) -> Iterator[tuple[str, float | None]]:
        for batch in (1,) if is_one else (8, 32):
            ratio = numbers.ratio(("decode", f"{FIRST} saving", batch), ("decode", f"{FIRST} alone", batch))
            yield f"{FIRST}, batch {batch}", None if ratio is None else ratio - 1

    return values


TARGETS: tuple[_Target, ...] = (
    _Target(
        text="hidden: restore time over its bound, from 4k tokens",
        limit=1.10,
        is_least=False,
        values=_to_bound("hidden", (FIRST, "llama2-13b")),
    ),
    _Target(
        text="auto: restore time over its bound, from 4k tokens",
        limit=1.10,
        is_least=False,
        values=_to_bound("auto", (FIRST, "llama2-13b", "llama3-8b")),
    ),
    _Target(text="restore: K and V over auto", limit=1.9, is_least=True, values=_over("restore", "kv")),
    _Target(text="restore: Cake over auto", limit=1.4, is_least=True, values=_over("restore", "cake")),
    _Target(text="restore: recomputation over auto", limit=4.0, is_least=True, values=_over("restore", "recompute")),
    _Target(text="first token: K and V over auto", limit=1.8, is_least=True, values=_over("ttft", "kv")),
    _Target(text="time between tokens that saving adds, batch 1", limit=0.02, is_least=False, values=_saving(True)),
    _Target(text="time between tokens that saving adds, from 8", limit=0.01, is_least=False, values=_saving(False)),
)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Of every target, wherever it applies; at one place at least."""
    numbers = Numbers(rows)
    return [
        Verdict(target=target.text, place=place, value=value, limit=target.limit, is_least=target.is_least)
        for target in TARGETS
        for place, value in target.values(numbers)
    ]
