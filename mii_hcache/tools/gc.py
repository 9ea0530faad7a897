"""`python -m mii_hcache gc`: give back to the disk what a state directory holds and nobody needs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from mii_hcache.core.amounts import parse_duration, parse_size
from mii_hcache.tools.collection import collect, plan
from mii_hcache.tools.directories import add_state_dir, chosen_dirs
from mii_hcache.tools.pinned import pinned_spans
from mii_hcache.tools.progress import Progress

_DESCRIPTION = """\
Gives back to the disk what a state directory holds and nobody needs, while no server uses it: free slots of segment
files, files of older format versions, files that a crash left unfinished, databases that were set aside as damaged, and
what deleted rows take in the databases. With --capacity, or --max-idle, also saved state itself: what was not used for
longest, down to so many bytes, or all that was not used for so long. Such conversations are computed again when they
come back.

A server does the first part by itself when it starts, and keeps to its --state-capacity; this is for a directory whose
server does not run, or is to run no more. Files of other stores, and what is damaged, are left alone: see fsck.
"""
_EXAMPLES = """\
examples:
  python -m mii_hcache gc --dry-run
      what would go from the directory that a server takes without --state-dir
  python -m mii_hcache gc --state-dir /nvme0/state --state-dir /nvme1/state --max-idle 30d
      all directories of a server that has several
  python -m mii_hcache gc --state-dir /nvme/state --capacity 100GiB
      keep what was used last; counts segment files, as the server's --state-capacity does, in each directory

exit status: 0 done, 2 not (one line says why: a server uses it; it is damaged; it is no state directory)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """0. Raises HCacheError."""
    options = _parser().parse_args(arguments)
    directories = chosen_dirs(options.state_dir)
    takes_spans = options.capacity is not None or options.max_idle is not None
    pinned = pinned_spans(directories) if takes_spans else frozenset()
    progress = Progress()
    collections = []
    try:
        for directory in directories:  # before the first one is changed, all are looked at
            progress.show(f"looking at {directory}")
            collections.append(
                plan(
                    directory,
                    capacity_bytes=options.capacity,
                    max_idle_s=options.max_idle,
                    keep_old=options.keep_format_old,
                    pinned=pinned,
                )
            )
        for collection in collections if not options.dry_run else []:
            progress.show(f"giving back {collection.view.path}")
            collect(collection)
    finally:
        progress.clear()
    if options.json:
        report = {"dry_run": options.dry_run, "state_dirs": [collection.to_dict() for collection in collections]}
        print(json.dumps(report, indent=2))
    else:
        print("\n\n".join("\n".join(collection.to_lines()) for collection in collections))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mii_hcache gc",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_state_dir(parser, "what to look at")
    parser.add_argument("--capacity", type=parse_size, metavar="SIZE", help="evict down to so much, in each directory")
    parser.add_argument("--max-idle", type=parse_duration, metavar="TIME", help="delete what was not used for so long")
    parser.add_argument(
        "--keep-format-old",
        action="store_true",
        help="keep files of older format versions, and databases that were set aside",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser
