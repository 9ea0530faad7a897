"""Ratios with their intervals, and those that were recorded for a device: what a later run must not fall below."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.rows import ROOT

DEFAULT_FILE = ROOT / "experiments" / "reference_ratios.json"
_DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Of two medians."""

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def median_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Median of `above` over that of `below`. The interval comes from drawing turns with replacement: both of a turn
    together, as they met the machine in the same mood. Seeded. Raises ValueError for unequal or empty series."""
    if len(above) != len(below) or not above:
        raise ValueError(f"as many turns of both are needed, got {len(above)} and {len(below)}")
    chance, drawn = random.Random(0), []
    for _ in range(_DRAWS):
        turns = chance.choices(range(len(above)), k=len(above))
        drawn.append(statistics.median(above[idx] for idx in turns) / statistics.median(below[idx] for idx in turns))
    drawn.sort()
    return Ratio(
        value=statistics.median(above) / statistics.median(below),
        low=drawn[round(0.025 * (_DRAWS - 1))],
        high=drawn[round(0.975 * (_DRAWS - 1))],
    )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a file has of one device, model and store. The file: device -> model -> tokens of history -> store ->
    ratio, its noise (half of its interval), and where it came from."""

    device: str
    model: str
    store: str
    file: Path = DEFAULT_FILE

    def recorded(self, history_tokens: int) -> Mapping[str, Any] | None:
        """None when there is nothing."""
        body = _read(self.file)
        for key in (self.device, self.model, str(history_tokens), self.store):
            body = body.get(key, {})
        return body or None

    def judge(self, history_tokens: int, found: Ratio) -> tuple[bool, str]:
        """(whether it is lower than what was recorded, a sentence about it)."""
        entry = self.recorded(history_tokens)
        where = f"{history_tokens:,} tokens of {self.model} from {self.store} on {self.device}"
        if entry is None:
            return False, f"Nothing is recorded for {where}: `--record` does that."
        least = entry["ratio"] - entry["noise"]
        told = f"{entry['ratio']:.2f} (give or take {entry['noise']:.2f}, {entry['date']}, commit {entry['commit']})"
        if found.high < least:
            return True, f"**Slower than recorded**: {where}: {found}, recorded {told}."
        return False, f"As recorded or better: {where}: {found}, recorded {told}."

    def record(self, file: Path, history_tokens: int, found: Ratio, about: Mapping[str, Any]) -> None:
        """Add to a file, or replace what it has of the same."""
        body = _read(file)
        place = body
        for key in (self.device, self.model, str(history_tokens)):
            place = place.setdefault(key, {})
        place[self.store] = {
            "ratio": round(found.value, 4),
            "noise": round((found.high - found.low) / 2, 4),
            **{name: about[name] for name in ("how", "repeats", "versions", "commit", "date")},
        }
        staged = file.with_suffix(".tmp")
        staged.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        staged.replace(file)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
