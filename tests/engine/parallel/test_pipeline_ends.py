"""A program that uses several ranks as a library ends in order, in time, and by itself: after it lost a rank, and where
it just ends while something runs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mii_hcache.engine.demo_model import ensure_demo_model
from mii_hcache.engine.parallel.group import TIMEOUT_S
from tests.engine.parallel.ranks_kit import wait_until_gone

PROGRAM = """
import os, signal, sys, threading, time
import mii_hcache

def begin(pipe):
    told = []
    def ask():
        try:
            pipe("The sailor remembers the lighthouse.", max_new_tokens=3000, ignore_eos=True)
            told.append("an answer?")
        except mii_hcache.errors.HCacheError as error:
            told.append(f"error: {error}")
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while not pipe._opened.service.metrics().get("generated_tokens_total", 0) > 10:
        time.sleep(0.01)
    return thread, told

pipe = mii_hcache.pipeline(
    sys.argv[1], state_dir=sys.argv[2], tensor_parallel=2, method="hidden", dtype="float32", kv_blocks=200
)
followers = pipe._opened.service._engine.followers
print("others:", *followers.pids, flush=True)
thread, told = begin(pipe)
if sys.argv[3] == "a rank dies":
    os.kill(followers.pids[0], signal.SIGKILL)
    killed_s = time.monotonic()
    thread.join(60)
    print(told, f"told after {time.monotonic() - killed_s:.1f} s", flush=True)
    try:
        pipe("again", max_new_tokens=1)
    except mii_hcache.errors.HCacheError as error:
        print(f"again: {error}", flush=True)
    closing_s = time.monotonic()
    pipe.destroy()
    print(f"closed after {time.monotonic() - closing_s:.1f} s", flush=True)
assert thread.is_alive() == (sys.argv[3] == "it ends")
print("the end", flush=True)
"""


@pytest.mark.parametrize("what", ["a rank dies", "it ends"])
def test_a_program_ends_by_itself(tmp_path, what):
    model = ensure_demo_model(tmp_path / "model")
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model), str(tmp_path / "state"), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    try:
        lines = []
        assert program.stdout is not None and program.stderr is not None
        for line in program.stdout:
            lines.append(line.strip())
            if lines[-1] == "the end":
                break
        ended_s = time.monotonic()
        status = program.wait(timeout=60)
        said, complained = "\n".join(lines), program.stderr.read()
        assert status == 0, f"{status} after {time.monotonic() - ended_s:.1f} s:\n{said}\n{complained}"
        (pids,) = re.findall(r"others: ([\d ]+)", said)
        wait_until_gone([int(pid) for pid in pids.split()], 30.0)
        assert "terminate called" not in complained and "Traceback" not in complained, complained
        if what == "a rank dies":
            assert "['error: rank 1 of 2" in said and "again: rank 1 of 2" in said and "SIGKILL" in said
            for seconds in re.findall(r"after ([\d.]+) s", said):
                assert float(seconds) < 0.75 * TIMEOUT_S, said
    finally:
        program.kill()
        program.wait()
