"""Cells of a run, in order of what they answer: each one's rows reach the file when it is over, none starts too late.

A cell is done when its last row is in the file, the one of panel `cell` that says how long it took. A run that is
started again with the same file skips those; rows of a cell that was cut off are thrown away first. So a run may be
stopped at any moment, and a record cannot mix machines, commits or scales without refusing to. A cell that failed, hung
or took its process down with it comes last in the next run: the others shall be measured first.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from experiments.common.rows import Row, write_rows

FIGURE = "gpu_restore"
CELL, SKIPPED, FAILED = "cell", "skipped", "failed"
"""Panels of the rows that tell of cells themselves."""

BEGUN = "begun"
"""File beside the rows: the key of the cell that runs. It is left behind by a process that did not live to its end."""
HANG_FACTOR, HANG_S = 4.0, 45.0
"""A cell hangs that takes so many times as long as expected, and so many seconds."""

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Number:
    """One number of a cell. `panel` is the stage, with `.statistic` behind it where it is not the median; `how` as in
    `Row`."""

    panel: str
    series: str
    x: float | str
    y: float | None
    unit: str
    how: str = "measured"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A piece of the run that makes its numbers by itself."""

    key: str
    model: str
    """Engine that it needs, "" for none: cells of one model in a row share it."""
    expected_s: float
    """It does not start when less is left."""
    measure: Callable[[], Iterable[Number]]
    is_gate: bool = False
    """When it fails, nothing after it counts: the run ends."""


class GateFailed(Exception):
    """What was restored is wrong: no time that this run could measure would mean anything."""


class DeviceLost(Exception):
    """The device answers this process no more (a kernel went astray): another process may go on."""


@dataclass(kw_only=True)
class Deadline:
    """Seconds from now on."""

    total_s: float
    _started_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Negative when it has passed."""
        return self.total_s - (time.monotonic() - self._started_s)


class Ledger:
    """The file of rows. One process."""

    def __init__(self, path: Path, stamp: Row) -> None:
        """`stamp`: a row with the machine, versions and commit that all rows get. Raises ValueError for a file that was
        made by something else."""
        self.path = path
        self._stamp = stamp
        self._begun = path.with_name(BEGUN)
        rows = list(whole_rows(path))
        for row in rows:
            for name in ("figure", "machine", "versions", "commit"):
                mine, found = getattr(stamp, name), getattr(row, name)
                if mine != found:
                    raise ValueError(f"{path} has rows of another {name} ({found}, now {mine}): give another file")
        self.done = {row.series for row in rows if row.panel == CELL}
        self.failed = {row.series for row in rows if row.panel == FAILED}
        """Keys of cells that failed in earlier runs, or ended them."""
        if self._begun.is_file():
            self.failed.add(self._begun.read_text(encoding="utf-8"))
        self.failed -= self.done
        self.rows = [row for row in rows if row.cell in self.done and row.panel not in (SKIPPED, FAILED)]
        write_rows(path, self.rows)

    def add(self, numbers: Iterable[Number], cell: str) -> None:
        """To the end of the file, and to the disk."""
        rows = [
            replace(self._stamp, cell=cell, **{name: getattr(number, name) for name in Number.__dataclass_fields__})
            for number in numbers
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(asdict(row), ensure_ascii=False)}\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def run(
        self,
        cells: Sequence[Cell],
        deadline: Deadline,
        say: Progress,
        *,
        recover: Callable[[], None] = lambda: None,
        ends_hanging: bool = False,
    ) -> int:
        """Every cell that is not done and for which there is time; those that failed before at the end. Returns how
        many failed. Raises GateFailed.

        `recover` is called behind a cell that failed, and may raise DeviceLost, which ends the run. `ends_hanging`: a
        cell that hangs ends the process, which says where each of its threads is."""
        num_failed = 0
        for cell in sorted(cells, key=lambda cell: cell.key in self.failed and not cell.is_gate):
            if cell.key in self.done:
                continue
            left_s = deadline.left_s
            if left_s < cell.expected_s:
                note = f"not measured: {max(0.0, left_s):.0f} s were left, it takes about {cell.expected_s:.0f}"
                self.add([Number(panel=SKIPPED, series=cell.key, x="", y=None, unit="s", note=note)], cell.key)
                say(f"{cell.key}: {note}")
                continue
            started_s = time.monotonic()
            say(f"{cell.key} ({left_s:.0f} s left)")
            numbers: list[Number] | None = None
            try:
                with self._running(cell, ends_hanging):
                    numbers = list(cell.measure())
            except Exception as error:
                if not isinstance(error, GateFailed):
                    traceback.print_exc()
                note = f"{type(error).__name__}: {error}"[:500]
                self.add([Number(panel=FAILED, series=cell.key, x="", y=None, unit="s", note=note)], cell.key)
                say(f"{cell.key}: FAILED: {note}")
                if cell.is_gate:
                    raise GateFailed(note) from error
            if numbers is None:  # here, where the error is gone, and with its frames what they held of the device
                num_failed += 1
                recover()
                continue
            took_s = time.monotonic() - started_s
            self.add([*numbers, Number(panel=CELL, series=cell.key, x="took", y=took_s, unit="s")], cell.key)
            self.done.add(cell.key)
        return num_failed

    @contextmanager
    def _running(self, cell: Cell, ends_hanging: bool) -> Iterator[None]:
        """While it does, its key is in the file."""
        self._begun.write_text(cell.key, encoding="utf-8")
        if ends_hanging:
            faulthandler.dump_traceback_later(max(HANG_S, HANG_FACTOR * cell.expected_s), exit=True)
        try:
            yield
        finally:
            if ends_hanging:
                faulthandler.cancel_dump_traceback_later()
            self._begun.unlink(missing_ok=True)


def whole_rows(path: Path) -> Iterator[Row]:
    """Whole lines; a process that was killed may have left half of the last one."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield Row.of(json.loads(line))
