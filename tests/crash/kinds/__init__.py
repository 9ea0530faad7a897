"""The kinds of trouble, by name: each a function that takes a `Case` and raises when a promise was broken."""

from __future__ import annotations

from collections.abc import Callable

from tests.crash.case import Case, Unavailable
from tests.crash.kinds import engine, flip, fuzz, kill, lost, model, torn, trouble

__all__ = ["KINDS", "Unavailable"]

KINDS: dict[str, Callable[[Case], None]] = {
    "kill": kill.run,
    "torn": torn.run,
    "lost": lost.run,
    "flip": flip.run,
    "full": trouble.full,
    "eio": trouble.failing,
    "short": trouble.short,
    "stall": trouble.stall,
    "model": model.run,
    "fuzz": fuzz.run,
    "engine": engine.run,
}
