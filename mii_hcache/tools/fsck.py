"""`python -m mii_hcache fsck`: is everything that was saved still what was saved?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial

from mii_hcache.tools.checkup import check, repair
from mii_hcache.tools.directories import add_state_dir, chosen_dirs
from mii_hcache.tools.progress import Progress

_DESCRIPTION = """\
Reads every byte of a state directory that no server uses and checks it: both databases, row by row, each segment
file's header, each chunk's header against what the catalog says of it, each payload against its CRC32C. Says what else
lies there: files of other stores or older formats, files that were never finished, places that nothing names.

Changes nothing without --repair. With it, what is damaged is forgotten, and never more: a conversation is then computed
again from where it was damaged on. A damaged database is set aside (FILE.damaged-N.sqlite), as a server would do when
it starts; but of a catalog, what is provably right is taken over, which a server does not take the time for. A chunk
that the disk does not give (an I/O error) is reported and kept: the disk may do better tomorrow.

A server does not need this: it checks every chunk that it reads. It is for after a crash of the machine, for a disk
that is doubted, for a copy of a state directory.
"""
_EXAMPLES = """\
examples:
  python -m mii_hcache fsck
      the directory that a server takes without --state-dir
  python -m mii_hcache fsck --state-dir /nvme0/state --state-dir /nvme1/state --repair
      all directories of a server that has several
  python -m mii_hcache fsck --state-dir /nvme/state --json
      for a script

exit status: 0 all is sound, 1 something is, or was before --repair, damaged or lost, 2 it could not be looked at (a
server uses it; it is no state directory)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 when something is damaged or lost. Raises HCacheError when it cannot be found out."""
    options = _parser().parse_args(arguments)
    checkups = []
    for directory in chosen_dirs(options.state_dir):
        progress = Progress()
        try:
            checkups.append(check(directory, partial(progress.count, "chunks")))
            if options.repair:
                repair(checkups[-1])
        finally:
            progress.clear()
    is_clean = all(checkup.is_clean for checkup in checkups)
    if options.json:
        print(json.dumps({"ok": is_clean, "state_dirs": [checkup.to_dict() for checkup in checkups]}, indent=2))
    else:
        print("\n\n".join("\n".join(checkup.to_lines()) for checkup in checkups))
    return 0 if is_clean else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mii_hcache fsck",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_state_dir(parser, "what to check")
    parser.add_argument("--repair", action="store_true", help="forget what is damaged")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser
