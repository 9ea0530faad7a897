"""The pauses that `MII_HCACHE_CHAOS` makes, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import threading, time
from tests import chaos
chaos.LONGEST_S = 1e-6
pauses = []
time.sleep = lambda pause_s: pauses.append(threading.current_thread().name)
chaos.begin_if_asked()
from mii_hcache.core.identity import pack_tokens
def work():
    for _ in range(1000):
        pack_tokens([1])
thread = threading.Thread(target=work, name="other")
thread.start()
thread.join()
work()
print(pauses.count("other"), pauses.count("MainThread"))
"""


@pytest.mark.parametrize(("chance", "least", "most"), [("", 0, 0), ("0.1", 100, 2000)])
def test_threads_pause_in_the_product_s_code_where_it_is_asked_for(chance, least, most):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MII_HCACHE_CHAOS": chance}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    for num_pauses in map(int, done.stdout.split()):
        assert least <= num_pauses <= most
