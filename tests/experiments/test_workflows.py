"""The workflows are well-formed, and what they run is there."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from experiments import compare_attentionstore
from experiments.common.rows import ROOT

yaml = pytest.importorskip("yaml")

FOLDER = ROOT / ".github" / "workflows"
NAMES = sorted(path.name for path in FOLDER.glob("*.yml"))


def workflow(name: str) -> dict[Any, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def test_both_are_there():
    assert NAMES == ["ci.yml", "gpu.yml"]


@pytest.mark.parametrize("name", NAMES)
def test_it_may_only_read_and_ends(name):
    body = workflow(name)
    assert body["permissions"] == {"contents": "read"}
    assert body["concurrency"]["group"]
    assert all(0 < job["timeout-minutes"] <= 120 for job in body["jobs"].values())
    used = [step["uses"] for step in steps(name) if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[a-z-]+@v\d+", one) for one in used)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_runs_is_there(name):
    commands = [step["run"] for step in steps(name) if "run" in step]
    assert "scripts/test.sh" in commands
    files = {
        word for command in commands for word in re.findall(r"(?:scripts|experiments|csrc|tests)/[\w./-]+", command)
    }
    assert files and all((ROOT / file).is_file() for file in files)
    assert all((ROOT / file).stat().st_mode & 0o111 for file in files if file.endswith(".sh"))


def triggers(name: str) -> dict[str, Any]:
    return workflow(name)[True]  # YAML 1.1 reads the key `on` as a boolean


def test_the_gpu_never_runs_pull_requests():
    assert set(triggers("gpu.yml")) == {"push", "workflow_dispatch", "schedule"}
    assert triggers("gpu.yml")["push"] == {"branches": ["main"]}
    assert [job["runs-on"] for job in workflow("gpu.yml")["jobs"].values()] == [["self-hosted", "gpu"]]
    assert "pull_request" in triggers("ci.yml")


def test_the_options_of_the_comparison_exist():
    commands = [step["run"] for step in steps("gpu.yml") if "compare_attentionstore.py" in step.get("run", "")]
    assert len(commands) == 1
    words = shlex.split(commands[0])
    given = words[words.index("experiments/compare_attentionstore.py") + 1 :]
    options = compare_attentionstore.parse(given)
    assert options.check and options.table and options.json
    uploaded = [step["with"]["path"] for step in steps("gpu.yml") if "upload-artifact" in step.get("uses", "")]
    assert uploaded == ["${{ runner.temp }}/comparison.*"] and options.table.name == "comparison.md"


def test_kernels_are_compiled_by_pips_nvcc():
    job = workflow("ci.yml")["jobs"]["kernels"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    packages = re.findall(r'"(nvidia-[a-z-]+)==(\S+)"', commands[0])
    assert {name for name, _ in packages} == {
        f"nvidia-{one}" for one in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "nvvm")
    }
    assert {version for _, version in packages} == {"13.0.*"}  # they are of one version, or nvcc does not find itself
    assert commands[1].startswith("python csrc/build_kernels.py ")
    assert commands[2].startswith("python -m pytest tests/native/test_gpu_kernels.py")
