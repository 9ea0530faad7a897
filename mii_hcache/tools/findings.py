"""What a doctor finds: one line for each thing that a server may need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing, and how it is."""

    name: str
    state: str
    """`ok`; `off`: not there, and a server does without; `problem`: something should be done."""
    reason: str
    """What was seen."""
    advice: str = ""
    """What to do; empty when nothing is to be done."""
    prevents_serving: bool = False


Check = Callable[[], Finding]


def ok(name: str, reason: str, advice: str = "") -> Finding:
    """It works."""
    return Finding(name=name, state="ok", reason=reason, advice=advice)


def off(name: str, reason: str, advice: str = "") -> Finding:
    """It is not there, and nobody misses it badly."""
    return Finding(name=name, state="off", reason=reason, advice=advice)


def problem(name: str, reason: str, advice: str, *, prevents_serving: bool = False) -> Finding:
    """Something should be done about it."""
    return Finding(name=name, state="problem", reason=reason, advice=advice, prevents_serving=prevents_serving)


def find_out(checks: Iterable[tuple[str, Check]], *, essential: bool) -> Iterator[Finding]:
    """Run checks in order. One that fails itself is a finding too, and prevents serving if the checks are `essential`:
    a doctor is called when things are broken."""
    for name, check in checks:
        try:
            yield check()
        except Exception as error:
            reason = f"could not be found out: {type(error).__name__}: {error}"
            yield problem(name, reason, "see the reason", prevents_serving=essential)
