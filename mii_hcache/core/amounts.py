"""Sizes and times as people write them on a command line."""

from __future__ import annotations

import argparse
import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw]?)")
_UNIT_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_size(text: str) -> int:
    """Bytes of `20GiB`, `512 MiB`, `1.5T`, `1000000`. `GB` is taken as `GiB`: nobody means a tenth less."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 20GiB, 512MiB or a number of bytes")
    number, prefix, _ = match.groups()
    return int(float(number) * 2 ** (10 * " kmgt".index(prefix.lower() or " ")))


def format_size(num_bytes: int) -> str:
    """The shortest way to write a size that `parse_size` reads."""
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << exponent:
            return f"{num_bytes / (1 << exponent):.4g}{unit}"
    return f"{num_bytes}"


def parse_duration(text: str) -> float:
    """Seconds of `45s`, `90m`, `12h`, `30d`, `2w` or a number of seconds."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 12h, 30d or a number of seconds")
    return float(match[1]) * _UNIT_S[match[2]]
