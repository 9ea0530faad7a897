"""Cases of all kinds in turn, until the time is over."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.case import Case, Nursery
from tests.crash.kinds import KINDS, Unavailable
from tests.crash.library import build_library
from tests.crash.verify import WrongBytes

_IN_MEMORY = {"flip", "fuzz"}
"""Kinds that do not ask the disk to keep anything, so that most of their cases need not wait for one."""
_MEMORY = "/dev/shm"


@dataclass(kw_only=True)
class Failure:
    """A case that broke a promise."""

    kind: str
    command: str
    error: str
    kept: str
    """Directory with all files of the case."""
    served_wrong: bool


@dataclass(kw_only=True)
class Report:
    """What a campaign found."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """By `kind io xPATHS`."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Kinds that cannot run here, and why."""
    failures: list[Failure] = field(default_factory=list)

    def as_json(self) -> str:
        """One object."""
        return json.dumps(
            {
                "kinds": {name: dict(sorted(counts.items())) for name, counts in self.counts.items()},
                "served_wrong": sum(failure.served_wrong for failure in self.failures),
                "failures": [vars(failure) for failure in self.failures],
                "skipped": self.skipped,
            },
            indent=2,
        )

    def lines(self) -> Iterator[str]:
        """For people."""
        for name, counts in self.counts.items():
            yield f"{name:24} " + ", ".join(f"{num} {what}" for what, num in sorted(counts.items()))
        for kind, why in self.skipped.items():
            yield f"{kind:24} not run: {why}"
        wrong = sum(failure.served_wrong for failure in self.failures)
        yield f"served wrong: {wrong}; broken promises of other kinds: {len(self.failures) - wrong}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run."""

    kinds: Sequence[str]
    ios: Sequence[str]
    paths: Sequence[int]
    seed: int
    seconds: float = float("inf")
    first_case: int = 0
    num_cases: int | None = None
    """Of each kind, backend and number of paths; None for as many as there is time for."""
    mutate: str | None = None
    max_failures: int = 5

    def command(self, kind: str, io: str, num_paths: int, number: int) -> str:
        """Runs one case again."""
        what = f"--kinds {kind} --io {io} --paths {num_paths} --seed {self.seed} --case {number}"
        return f"python -m tests.crash {what}" + (f" --mutate {self.mutate}" if self.mutate else "")


def run_campaign(plan: Plan, *, keep: Path | None = None, tell: Callable[[str], None] = lambda line: None) -> Report:
    """Run cases, in turn over kinds, backends and numbers of paths. Directories of failed cases are moved to `keep`."""
    report = Report()
    stop_s = time.monotonic() + plan.seconds
    with ExitStack() as stack:
        library, why_not = build_library(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        nursery = Nursery(library=library)
        stack.callback(nursery.undo.close)
        todo = [(kind, io, paths) for kind in plan.kinds for paths in plan.paths for io in plan.ios]
        number = plan.first_case
        while todo and time.monotonic() < stop_s and len(report.failures) < plan.max_failures:
            for choice in list(todo):
                if time.monotonic() >= stop_s or len(report.failures) >= plan.max_failures:
                    break
                kind, io, paths = choice
                try:
                    failure = _run_case(plan, choice, number, nursery, report, keep)
                except Unavailable as error:
                    report.skipped[f"{kind} {io} x{paths}"] = f"{error}" + (f" ({why_not})" if why_not else "")
                    todo.remove(choice)
                    continue
                if failure is not None:
                    tell(f"FAILED {failure.error}\n  again: {failure.command}\n  files: {failure.kept}")
                left = "" if plan.seconds == float("inf") else f", {max(0.0, stop_s - time.monotonic()):.0f} s left"
                tell(f"case {number} of {kind} {io} x{paths}; {len(report.failures)} failures{left}")
            number += 1
            if plan.num_cases is not None and number >= plan.first_case + plan.num_cases:
                break
    return report


def _run_case(
    plan: Plan, choice: tuple[str, str, int], number: int, nursery: Nursery, report: Report, keep: Path | None
) -> Failure | None:
    kind, io, paths = choice
    in_memory = kind in _IN_MEMORY and number % 4 != 3 and os.access(_MEMORY, os.W_OK)
    root = Path(tempfile.mkdtemp(prefix=f"crash-{kind}-{number}-", dir=_MEMORY if in_memory else None))
    case = Case(
        kind=kind,
        seed=f"{plan.seed} {number}",
        io=io,
        num_paths=paths,
        root=root,
        nursery=nursery,
        mutate=plan.mutate,
    )
    started_s, kept = time.monotonic(), "not kept"
    try:
        KINDS[kind](case)
    except Unavailable:
        raise
    except Exception as error:  # whatever it is: a case that raises has failed, and the next one runs
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            kept = str(keep / f"{root.name}-{io}-x{paths}")
            shutil.copytree(root, kept)
            (Path(kept) / "error.txt").write_text(traceback.format_exc())
        failure = Failure(
            kind=kind,
            command=plan.command(kind, io, paths, number),
            error=f"{type(error).__name__}: {error}",
            kept=kept,
            served_wrong=isinstance(error, WrongBytes),
        )
        report.failures.append(failure)
        return failure
    finally:
        shutil.rmtree(root, ignore_errors=True)
        if case.counts:
            total = report.counts.setdefault(f"{kind} {io} x{paths}", Counter())
            total.update(case.counts)
            total["cases"] += 1
            total["milliseconds"] += int((time.monotonic() - started_s) * 1000)
    return None


def say_progress(line: str) -> None:
    """One line that is written over, on a terminal; else only what matters."""
    if line.startswith("FAILED"):
        print(f"\n{line}", file=sys.stderr, flush=True)
    elif sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
