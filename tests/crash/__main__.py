"""`python -m tests.crash`."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mii_hcache.storage.native import why_no_uring
from tests.crash.campaign import Plan, run_campaign, say_progress
from tests.crash.case import Case
from tests.crash.kinds import KINDS
from tests.crash.mutations import MUTATIONS

_EPILOG = """\
A case is one store with one kind of trouble, made from --seed and its number. Every chunk that a store serves is
compared with what was written; what a flush acknowledged must be there (unless it was evicted or deleted), what was
deleted and flushed must be gone. A failing case says how to run it again, and leaves its files under --keep. Where
processes are killed after a time, the same seed gives the same work but not the same instant: run it with several
--cases, or look at the files.

examples:
  python -m tests.crash --minutes 10                          everything, on every backend that works here
  python -m tests.crash --kinds lost --io threads --seed 7    power cuts only
  python -m tests.crash --kinds flip --mutate no-payload-check --minutes 1    must fail: proves that the campaign can
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign; 1 when a promise was broken."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash",
        description="Crash, cut, damage, fill and stall stores, and look for anything wrong that is served.",
        epilog=_EPILOG + "\nkinds:\n" + "\n".join(f"  {name:10} {_first_line(kind)}" for name, kind in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default 1)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which kinds, by commas (default all, see below)")
    parser.add_argument("--io", default="", help="backends, by commas: uring,threads (default: all that work here)")
    parser.add_argument(
        "--paths",
        default="",
        help="state directories per store, by commas: 1,2 (default 1, and 2 where striping is built)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of everything (default 1)")
    parser.add_argument("--case", type=int, help="run this one case of each kind and no other")
    parser.add_argument("--cases", type=int, help="so many cases of each kind, instead of as many as there is time for")
    parser.add_argument("--mutate", choices=MUTATIONS, help="put a defect into the store: the campaign must fail")
    parser.add_argument(
        "--keep", type=Path, default=Path(tempfile.gettempdir()) / "hcache-crash", help="where files of failed cases go"
    )
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    args = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)  # a damaged store warns a great deal
    ios = args.io.split(",") if args.io else ["threads"] + ([] if why_no_uring() else ["uring"])
    paths = [int(num) for num in args.paths.split(",")] if args.paths else [1, 2]
    kinds = args.kinds.split(",")
    unknown = set(kinds) - KINDS.keys()
    if unknown:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    plan = Plan(
        kinds=kinds,
        ios=ios,
        paths=paths,
        seed=args.seed,
        seconds=args.minutes * 60,
        first_case=args.case or 0,
        num_cases=1 if args.case is not None else args.cases,
        mutate=args.mutate,
    )
    report = run_campaign(plan, keep=args.keep, tell=say_progress)
    print(report.as_json() if args.json else "\n".join(report.lines()))
    return 1 if report.failures else 0


def _first_line(kind: Callable[[Case], None]) -> str:
    module = sys.modules[kind.__module__]
    told = module.__doc__ if kind.__name__ == "run" else kind.__doc__
    return (told or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
