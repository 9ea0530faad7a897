"""Machines without a compiler, and machines where io_uring is not allowed: all works, and the reason is told."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mii_hcache.storage import native

ROOT = Path(__file__).resolve().parents[2]
STORE = """\
import sys
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.state_dir import StateDir
from tests.storage.storage_kit import holds, make_record, put
store = FileStore(StateDir(sys.argv[1]), 1 << 20)
assert put(store, make_record("a")) and holds(store, make_record("a"))
print(store.io.name + ": " + store.io_reason)
store.close()
"""


@pytest.mark.skipif(native.why_not_built() is not None, reason=str(native.why_not_built()))
def test_where_io_uring_is_denied_threads_take_over(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(STORE)
    command = [sys.executable, "-m", "tests.native.denied", str(program), str(tmp_path / "state")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "no seccomp filter" in done.stderr:
        pytest.skip("this kernel has no seccomp filters")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("threads: io_uring is not allowed here"), done.stdout


@pytest.mark.skipif(find_spec("pybind11") is None, reason="pybind11 is not installed outside of builds")
def test_an_installation_without_a_compiler_goes_through(tmp_path):
    command = [sys.executable, "setup.py", "build", f"--build-base={tmp_path}"]
    environment = {**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'building extension "mii_hcache._io" failed' in done.stderr + done.stdout
    assert list(tmp_path.rglob("storage/file.py")) and not list(tmp_path.rglob("*.so"))
