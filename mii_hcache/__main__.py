"""`python -m mii_hcache COMMAND`: one door to every command. Only the command that is asked for is imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from mii_hcache import __version__
from mii_hcache.errors import HCacheError

COMMANDS = {
    "serve": ("mii_hcache.serve.__main__", "a server with OpenAI's API whose conversations come back fast"),
    "selfcheck": ("mii_hcache.tools.selfcheck", "does a restored conversation say the same here, and how fast is it?"),
    "doctor": ("mii_hcache.tools.doctor", "what is on, what is off, why, and what to do about it"),
    "plan": ("mii_hcache.tools.plan", "what would be stored for a model, and how fast histories would come back"),
    "profile": ("mii_hcache.tools.profile", "measure this machine for a model: what plans are made of"),
    "bench": ("mii_hcache.tools.bench", "how fast this disk and this memory are, and what reading them costs"),
    "inspect": ("mii_hcache.tools.inspection", "what a state directory holds; --verify reads every byte of it"),
    "fsck": ("mii_hcache.tools.fsck", "is all of a state directory as it was saved? --repair forgets what is not"),
    "gc": ("mii_hcache.tools.gc", "give back to the disk what a state directory holds and nobody needs"),
}
"""Name to module with `main(arguments) -> exit status`, and what it is for."""

_EXIT_REFUSED = 2
_EXIT_UNREAD = 128 + signal.SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: the command's own; 2 when it could not be done at all (one line says why)."""
    try:
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as by `| head`: it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_UNREAD


def _run(arguments: list[str]) -> int:
    name, *rest = arguments or [""]
    if name in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if name in ("-V", "--version"):
        print(f"mii_hcache {__version__}")
        return 0
    if name not in COMMANDS:
        complaint = f"there is no command {name!r}" if name else "a command is missing"
        print(f"mii_hcache: {complaint}\n\n{_usage()}", file=sys.stderr)
        return _EXIT_REFUSED
    try:
        status: int = import_module(COMMANDS[name][0]).main(rest)
        return status
    except HCacheError as error:
        print(f"mii_hcache {name}: {error}", file=sys.stderr)
        return _EXIT_REFUSED
    except KeyboardInterrupt:
        return 130


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: python -m mii_hcache COMMAND [options]",
            "",
            "commands:",
            *(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()),
            "",
            "first steps:",
            "  python -m mii_hcache doctor                      is everything here that a server needs?",
            "  python -m mii_hcache selfcheck --model ./llama   prove it on your model, in about a minute",
            "  python -m mii_hcache serve --model ./llama       then serve it",
            "",
            "`python -m mii_hcache COMMAND --help` explains a command and its options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
