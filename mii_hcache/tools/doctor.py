"""`python -m mii_hcache doctor`: what is on, what is off, and why."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from mii_hcache import __version__
from mii_hcache.config import quiet_libraries
from mii_hcache.tools.directories import add_state_dir, chosen_dirs
from mii_hcache.tools.findings import Finding, find_out
from mii_hcache.tools.machine_checks import machine_checks
from mii_hcache.tools.nvme_checks import nvme_checks
from mii_hcache.tools.progress import Progress
from mii_hcache.tools.software_checks import software_checks
from mii_hcache.tools.state_checks import state_checks

_DESCRIPTION = """\
Looks at everything that a server needs or could use, and says of each: ok, off (not there; a server does without), or
problem (with what to do). Loads no model and changes nothing.
"""
_EXAMPLES = """\
examples:
  python -m mii_hcache doctor
  python -m mii_hcache doctor --model ./llama --state-dir /nvme/state
      also: is this model served, and how is its state saved?
  python -m mii_hcache doctor --json
      for a script

exit status: 0 a server can run, 1 something prevents it
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 when something prevents serving."""
    options = _parser().parse_args(arguments)
    quiet_libraries()
    directories = chosen_dirs(options.state_dir)
    progress = Progress()
    findings: list[Finding] = []
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed writes to stdout, which may be read by a script
        progress.show("looking around")
        findings += find_out(software_checks(options.model), essential=True)
        findings += find_out([*machine_checks(), *state_checks(directories)], essential=False)
        findings += find_out(nvme_checks(directories), essential=False)
    progress.clear()
    can_serve = not any(finding.prevents_serving for finding in findings)
    if options.json:
        report = {"version": __version__, "ok": can_serve, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
    else:
        print("\n".join([f"mii_hcache {__version__}", "", *_lines(findings), "", _verdict(findings)]))
    return 0 if can_serve else 1


def _lines(findings: Sequence[Finding]) -> list[str]:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<7}  {finding.name:<{width}}  {finding.reason}")
        if finding.advice:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.advice}")
    return lines


def _verdict(findings: Sequence[Finding]) -> str:
    blocking = [finding.name for finding in findings if finding.prevents_serving]
    if blocking:
        return f"A server cannot run: {', '.join(blocking)}."
    num_problems = sum(finding.state == "problem" for finding in findings)
    others = f", with {num_problems} problem{'s' * (num_problems > 1)}" if num_problems else ""
    return f"A server can run{others}. To see it proved: python -m mii_hcache selfcheck"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mii_hcache doctor",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="also look at this checkpoint's config")
    add_state_dir(parser, "where state would be kept")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser
