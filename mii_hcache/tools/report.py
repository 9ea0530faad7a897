"""What a self-check found, as a table and as JSON."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from mii_hcache.tools.table import table

NOISY_SPREAD = 2.0
"""Timed runs of one row that differ by more than this factor say that something else was running."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way, measured and judged."""

    history_tokens: int
    way: str
    """`resident`, `recompute`, `cold/KIND`, `KIND/memory`, `KIND/file`."""
    reused_tokens: int
    times_s: list[float]
    """To the first token, each timed run."""
    read_bytes: int = 0
    num_tokens: int = 0
    num_equal: int = 0
    max_logit_difference: float = 0.0
    logit_bound: float = 0.0
    max_kv_difference: float | None = None
    kv_bound: float | None = None
    problems: list[str] = field(default_factory=list)
    """What is beyond its bound; empty when all is well."""

    @property
    def ttft_s(self) -> float:
        """Median."""
        return statistics.median(self.times_s)


@dataclass(kw_only=True)
class Report:
    """What was found."""

    model: str
    dtype: str
    machine: str
    software: dict[str, str | None]
    state_dir: str
    filesystem: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was shortened or skipped, and why."""
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        """One sentence for each row and what is wrong with it."""
        return [f"history {row.history_tokens}, {row.way}: {what}" for row in self.rows for what in row.problems]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [
            {
                **{name: _finite(value) for name, value in asdict(row).items() if name != "times_s"},
                "ttft_ms": round(1e3 * row.ttft_s, 3),
                "timed_runs_ms": [round(1e3 * time_s, 3) for time_s in row.times_s],
                "speed_up": round(self._speed_up(row), 3),
                "read_bytes_per_token": row.read_bytes / max(1, row.reused_tokens),
                "ok": not row.problems,
            }
            for row in self.rows
        ]
        plain = {name: value for name, value in asdict(self).items() if name != "rows"}
        return {**plain, "ok": not self.problems, "problems": self.problems, "rows": rows}

    def to_text(self) -> str:
        """For people."""
        header = ["history", "way", "reused", "TTFT ms", "speed-up", "MB read", "bytes/token", "tokens equal"]
        header += ["logit diff", "bound", "K/V diff", "ok"]
        versions = ", ".join(f"{name} {number}" for name, number in self.software.items())
        lines = [
            f"{self.model}, {self.dtype}; files on {self.filesystem}, dropped from the page cache before each restore",
            f"measured on {self.machine}; {versions}",
            "",
            table(header, [self._cells(row) for row in self.rows], left=2),
            "",
            *self.notes,
            *self._busy(),
            *(f"WRONG  {problem}" for problem in self.problems),
            f"{'FAILED' if self.problems else 'passed'} after {self.seconds:.0f} s",
        ]
        return "\n".join(lines)

    def _speed_up(self, row: Row) -> float:
        """Over recomputing the same history."""
        (recomputed,) = (
            other for other in self.rows if other.way == "recompute" and other.history_tokens == row.history_tokens
        )
        return recomputed.ttft_s / row.ttft_s

    def _cells(self, row: Row) -> list[str]:
        is_reference = not row.num_tokens
        return [
            str(row.history_tokens),
            row.way,
            f"{row.reused_tokens}",
            f"{1e3 * row.ttft_s:.1f}",
            f"{self._speed_up(row):.2f}x",
            f"{row.read_bytes / 1e6:.1f}" if row.read_bytes else "-",
            f"{row.read_bytes / max(1, row.reused_tokens):,.0f}" if row.read_bytes else "-",
            "reference" if is_reference else f"{row.num_equal}/{row.num_tokens}",
            "-" if is_reference else f"{row.max_logit_difference:.2g}",
            "-" if is_reference else f"{row.logit_bound:.2g}",
            "-" if row.max_kv_difference is None else f"{row.max_kv_difference:.2g}",
            "NO" if row.problems else "yes",
        ]

    def _busy(self) -> list[str]:
        noisy = [row for row in self.rows if max(row.times_s) > NOISY_SPREAD * min(row.times_s)]
        if not noisy:
            return []
        worst = max(max(row.times_s) / min(row.times_s) for row in noisy)
        return [
            f"the machine was busy: timed runs of {len(noisy)} of {len(self.rows)} rows differ, by up to {worst:.1f} "
            "times; trust the answers, not the times"
        ]


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
