"""The C++ tests of csrc, built and run under the sanitizers, or plain where there are none. Outputs stay in build/ for
the next run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.gpu_kit import build_fakes

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ["address,undefined", "thread"]


def can_link(sanitizer: str, folder: Path) -> bool:
    """Whether a program of C++20 can be built and run, with the sanitizer's library."""
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("#include <atomic>\nint main() { int i = 0; return std::atomic_ref(i).load(); }\n")
    flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
    built = subprocess.run(["g++", "-std=c++20", *flags, str(source), "-o", str(program)], capture_output=True)
    return built.returncode == 0 and subprocess.run([str(program)], capture_output=True).returncode == 0


@pytest.mark.timeout(900)  # a minute's work, on a machine that does much else
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_engine_in_cpp(sanitizer, tmp_path):
    if not (shutil.which("g++") and shutil.which("make")):
        pytest.skip("no g++ or no make: the C++ tests cannot be built")
    if not can_link("", tmp_path):
        pytest.skip("g++ here cannot build and run C++20")
    used = sanitizer if can_link(sanitizer, tmp_path) else ""
    if not used:
        build_fakes()  # which others may be building at the same place
    build = ROOT / "build" / "csrc-tests" / (used or "plain")
    command = [
        *("make", "-C", str(ROOT / "csrc"), "-j2", "test"),
        *(f"SANITIZE={used}", f"BUILD={build}", f"TMP_DIR={tmp_path}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("ok ") >= 30, done.stdout[-4000:]
    if not used:
        pytest.skip(f"g++ here has no -fsanitize={sanitizer}: they passed without")
