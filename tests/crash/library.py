"""Building the library that stands between a process and its files."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("preload.c")


def build_library(directory: Path) -> tuple[Path | None, str | None]:
    """The library, built into `directory`; or None and why not."""
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        return None, "there is no C compiler"
    library = directory / "crash_preload.so"
    command = [
        compiler,
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        library,
        _SOURCE,
        "-ldl",
        "-pthread",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        return None, f"{compiler} fails: {done.stderr.strip()[:300]}"
    return library, None
