"""What a newcomer relies on: a light import, pins that agree with the accepted ranges, scripts that run."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mii_hcache

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
IMPORT_NAMES = {"flask-restful": "flask_restful", "pyzmq": "zmq", "grpcio": "grpc", "deepspeed-mii": "mii"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> Iterator[Requirement]:
    groups = project()["optional-dependencies"]
    for line in [*project()["dependencies"], *groups["mii"], *groups["test"]]:
        yield Requirement(line)


def pins() -> dict[str, str]:
    """Package to pinned version, of the lines that are for this Python."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"{line!r} does not pin one version"
        if pin.marker is None or pin.marker.evaluate():
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} is pinned twice"
            found[name] = str(pin.specifier)[2:]
    return found


def test_import_needs_neither_torch_nor_an_engine():
    heavy = ["torch", "deepspeed", "mii", "transformers", "tokenizers", "numpy", "fastapi"]
    code = f"import sys, mii_hcache; print([name for name in {heavy} if name in sys.modules])"
    env = {name: value for name, value in os.environ.items() if name != "PATH"} | {"PATH": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_editable_install_is_found_from_the_folder_around_the_checkout():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}, "else a folder `mii_hcache` in the working directory comes first"


def test_every_requirement_is_pinned_within_its_range():
    pinned = pins()
    for requirement in requirements():
        if requirement.name == "triton":
            continue  # torch's own pin must stand: see below
        if requirement.marker is None or requirement.marker.evaluate():
            version = pinned.get(canonicalize_name(requirement.name))
            assert version is not None, f"constraints.txt does not pin {requirement.name}"
            assert requirement.specifier.contains(version), f"constraints.txt: {requirement.name}=={version}"


def test_triton_is_pinned_for_tests_on_a_cpu_torch_only():
    assert "triton" not in pins()
    script = (ROOT / "scripts" / "bootstrap.sh").read_text(encoding="utf-8")
    (version,) = re.findall(r"^triton_version=(\S+)$", script, re.MULTILINE)
    groups = {
        group: [line for line in lines if line.startswith("triton")]
        for group, lines in project()["optional-dependencies"].items()
    }
    (line,) = groups.pop("test")
    assert Requirement(line).specifier.contains(version)
    assert not any(groups.values()) and not any(line.startswith("triton") for line in project()["dependencies"])


def test_every_import_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    declared -= {canonicalize_name(Requirement(line).name) for line in project()["optional-dependencies"]["test"]}
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared} | {"mii_hcache"}
    unknown = {}
    for path in (ROOT / "mii_hcache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            for top in {name.split(".")[0] for name in names} - known - sys.stdlib_module_names - {"triton"}:
                unknown.setdefault(top, str(path.relative_to(ROOT)))
    assert not unknown, f"imported, but not in pyproject.toml: {unknown}"  # triton comes with CUDA builds of torch


def test_the_changelog_starts_with_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == mii_hcache.__version__


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert project()["license"] == "Apache-2.0"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")


def test_ci_is_the_test_command():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "exec" in line] == ['exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/test.sh"']


def test_set_up_leaves_a_strange_folder_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = subprocess.run(
        [ROOT / "scripts" / "bootstrap.sh"],
        env={**os.environ, "MII_HCACHE_VENV": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "was not made by this script" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_set_up_asks_for_a_newer_python(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "bootstrap.sh"],
        env={**os.environ, "MII_HCACHE_VENV": str(tmp_path / "venv"), "PYTHON": str(old)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Python 3.10" in done.stderr
