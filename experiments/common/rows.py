"""Result rows: the one schema that every item writes and every plot reads, as JSON lines.

figure     item key, `fig11`
panel      of the figure, "" when it has one
series     the paper's name of the line or bar; ours, where the paper has none
x, y       x is a number or a category; y is None when the number is not there yet, and `note` says why
unit       of y: s, tokens/s, bytes, ratio, ...
how        measured | emulated | simulated | paper (emulated: on real hardware that was throttled)
machine    where it ran; of a simulated row the platform that is simulated
versions   of Python, this package and what else decides the number
commit     of this repository, `+` when files differed from it
note       what a reader must know of this number
cell       the piece of a run on this machine that made it, so that a run can go on where it stopped
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import mii_hcache

HOW = ("measured", "emulated", "simulated", "paper")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number. Raises ValueError for what a reader could misunderstand."""

    figure: str
    series: str
    x: float | str
    y: float | None
    unit: str
    how: str
    panel: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    note: str = ""
    cell: str = ""

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise ValueError(f"how must be one of {', '.join(HOW)}, got {self.how!r}")
        if not self.figure or not self.series or not self.unit:
            raise ValueError(f"figure, series and unit must be named, got {self}")
        if self.y is None and not self.note:
            raise ValueError(f"a missing y needs a note that says why, got {self}")
        if self.y is not None and not math.isfinite(self.y):
            raise ValueError(f"y must be finite, got {self}")

    @classmethod
    def of(cls, body: Any) -> Row:
        """From parsed JSON. Raises ValueError for unknown or missing fields."""
        known = {item.name for item in fields(cls)}
        if not isinstance(body, dict) or set(body) | {"cell"} != known:
            raise ValueError(f"a row must have exactly the fields {', '.join(sorted(known))}, got {body!r:.200}")
        return cls(**body)


@lru_cache(maxsize=1)
def provenance() -> tuple[dict[str, str], str]:
    """Versions and commit. Outside of a checkout the commit is `unknown`."""
    versions = {"python": platform.python_version(), "mii_hcache": mii_hcache.__version__}
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return versions, "unknown"
    return versions, head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def stamped(rows: Iterable[Row]) -> list[Row]:
    """The rows with versions and commit."""
    versions, commit = provenance()
    return [replace(row, versions=versions, commit=commit) for row in rows]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Replaces the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bodies = [{name: value for name, value in asdict(row).items() if name != "cell" or value} for row in rows]
    lines = [json.dumps(body, ensure_ascii=False) for body in bodies]
    staged = path.with_suffix(".tmp")
    staged.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    staged.replace(path)


def read_rows(path: Path) -> list[Row]:
    """Inverse of `write_rows`. A file that is not there has no rows."""
    if not path.is_file():
        return []
    return [Row.of(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
