"""Kernels are launched again as Triton launches them, and by Triton where anything is different."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(600)  # its kernels are compiled, unless they were before


@pytest.fixture(scope="module")
def seen():
    """What `launching.py` saw, in a process where nothing is interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.launching"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def of(seen, what):
    return [line for line in seen[0] if line["what"] == what]


def test_every_kernel_is_looked_at_once(seen):
    """New tensors at new addresses, and another number of tokens, are no news."""
    fronts = of(seen, "front")
    assert len(fronts) == 8
    for front in fronts:
        assert (front["first"], front["again"], front["is_alike"]) == ([1, 1], [1, 0], True), front
    grids = {front["name"]: front["grid"] for front in fronts}
    assert grids["add_norm"] == [9, 1, 1] and grids["rope_scatter"] == [1, 8, 1] and grids["restored"] == [1, 4, 1]


def test_arguments_are_tritons(seen):
    assert of(seen, "arguments")[0]["is_same"]
    assert of(seen, "stream")[0]["stream"] == 9, "the stream that is current"


def test_what_a_kernel_was_not_compiled_for_goes_to_another(seen):
    kinds = {line["name"]: line for line in of(seen, "kind")}
    assert {line["num"] for line in kinds.values()} == {1}
    looked = {name: line["looked"] for name, line in kinds.items()}
    assert looked == {
        "as before": 0,
        "misaligned": 1,
        "misaligned again": 1,
        "another integer": 1,
        "another dtype": 1,
        "as at first": 0,
    }
    functions = {line["function"] for line in kinds.values()}
    assert len(functions) == 4 and kinds["as before"]["function"] == kinds["as at first"]["function"]


def test_a_profiler_hears_of_every_launch(seen):
    assert of(seen, "profiler")[0]["at"] == [1, 1] and of(seen, "no profiler")[0]["at"] == [1, 0]


def test_another_triton_is_left_to_itself(seen):
    assert of(seen, "changed")[0]["at"] == [[1, 1]] * 3
    assert seen[1].count("launched the slow way") == 1


def test_it_is_faster(seen):
    (speed,) = of(seen, "speed")
    print(f"{speed['us']} us, by Triton {speed['triton_us']} us: {speed['note']}")
    assert speed["us"] < 0.5 * speed["triton_us"]
