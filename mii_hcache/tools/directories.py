"""The state directories that a tool is to look at."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mii_hcache.config import default_state_dirs
from mii_hcache.storage.stripe_set import StripeSet

DEFAULT_WORDS = os.pathsep.join(default_state_dirs())
"""What is looked at when nothing is given."""


def add_state_dir(parser: argparse.ArgumentParser, help_text: str) -> None:
    """`--state-dir`, as the server takes it."""
    parser.add_argument(
        "--state-dir",
        action="append",
        default=[],
        metavar="DIR",
        help=f"{help_text}; several times if the server's state is striped (default: {DEFAULT_WORDS})",
    )


def chosen_dirs(given: Sequence[str]) -> list[Path]:
    """What was given, else the server's default."""
    return [Path(one).expanduser() for one in given or default_state_dirs()]


def home_of(directories: Sequence[Path]) -> Path:
    """The one that keeps what there is one of, such as the profile. Raises ConfigError for what is no set."""
    if len(directories) == 1:
        return directories[0]
    return StripeSet.of([directory.absolute() for directory in directories]).seats[0].path
