"""Layers point down: serve, tools -> engine -> runtime -> storage -> core. Read from the source, not from the imports
that happen to run: those inside functions and under TYPE_CHECKING count as well."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mii_hcache"
MAX_LINES = 400

BELOW = {
    "errors": set(),
    "core": {"errors"},
    "config": {"core", "errors"},
    "storage": {"core", "errors"},
    "runtime": {"storage", "core", "config", "errors"},
    "engine": {"runtime", "storage", "core", "config", "errors"},
    "serve": {"engine", "runtime", "storage", "core", "config", "errors"},
    "tools": {"engine", "runtime", "storage", "core", "config", "errors"},
}
"""What a room may import of the package, besides itself and the package's own names (`__version__`). Modules on the
top level that are not listed (`__init__`, `__main__`) open doors to every room."""

ENGINES = {"deepspeed", "mii", "transformers", "tokenizers"}
OUTSIDE = {
    "errors": set(),
    "core": set(),
    "config": set(),
    "storage": {"crc32c"},
    "runtime": {"torch", "numpy", "triton"},
}
"""Third-party packages of the rooms that are kept nearly free of them. The other rooms may import any but ENGINES,
which are the engine's alone."""


def imported_names(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported: `from a import b` is `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") if node.level else []
            parts = parts[: len(parts) - node.level + is_package]
            base = ".".join(parts + ([node.module] if node.module else []))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def room_of(module: str) -> str:
    """`mii_hcache.core.cost` is in `core`; `mii_hcache.__version__` and `mii_hcache` are in no room: ``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in BELOW else ""


def complaints(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Every import of `source` that this house does not allow in `module`."""
    room, found = room_of(module), []
    for line, name in imported_names(ast.parse(source), module, is_package=is_package):
        top, target = name.split(".")[0], room_of(name)
        if top in {"tests", "experiments", "scripts"}:
            reason = f"{top} may be imported by nobody"
        elif top == "mii_hcache":
            if not room or not target or target == room or target in BELOW[room]:
                continue
            reason = f"{room} may import only {', '.join(sorted(BELOW[room])) or 'nothing'} of the package"
        elif top in sys.stdlib_module_names:
            continue
        elif top in ENGINES and room != "engine":
            reason = f"only engine may import {top}"
        elif room in OUTSIDE and top not in OUTSIDE[room]:
            reason = f"{room} may import only {', '.join(['the standard library', *sorted(OUTSIDE[room])])}"
        else:
            continue
        found.append(f"{module}:{line} imports {name}, but {reason}")
    return found


def modules() -> Iterator[tuple[Path, str, bool]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        yield path, ".".join(parts[:-1] if is_package else parts), is_package


def test_imports_point_down():
    found = []
    for path, module, is_package in modules():
        found += complaints(path.read_text(encoding="utf-8"), module, is_package=is_package)
    assert not found, "\n" + "\n".join(found)


def test_gpu_kernels_know_no_host():
    """What computes on the GPU needs torch and Triton only: it could serve another engine."""
    tops = set()
    for path, module, is_package in modules():
        if module.startswith("mii_hcache.engine.kernels"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            tops |= {name.split(".")[0] for _, name in imported_names(tree, module, is_package=is_package)}
    assert tops - sys.stdlib_module_names == {"mii_hcache", "numpy", "torch", "triton"}


def test_files_stay_readable():
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*")
        if path.suffix in {".py", ".html", ".css", ".js"}
    }
    too_long = {name: lines for name, lines in sizes.items() if lines > MAX_LINES}
    assert sizes and not too_long, f"longer than {MAX_LINES} lines, split them: {too_long}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mii_hcache.core.cost", "import torch"),
        ("mii_hcache.core.cost", "from mii_hcache.storage.base import ChunkStore"),
        ("mii_hcache.core.cost", "from mii_hcache import config"),
        ("mii_hcache.core.cost", "from ..storage import base"),
        ("mii_hcache.storage.file", "import numpy"),
        ("mii_hcache.storage.file", "from mii_hcache.config import HCacheConfig"),
        ("mii_hcache.runtime.saver", "def f():\n    from mii_hcache.engine import adapter"),
        ("mii_hcache.runtime.saver", "if TYPE_CHECKING:\n    import deepspeed.inference"),
        ("mii_hcache.engine.adapter", "from mii_hcache.serve.app import App"),
        ("mii_hcache.serve.app", "import transformers"),
        ("mii_hcache.serve.app", "from mii_hcache.tools import doctor"),
        ("mii_hcache.errors", "from .core import geometry"),
        ("mii_hcache.tools.bench", "import tests.storage.contract"),
        ("mii_hcache", "import mii"),
    ],
)
def test_an_import_that_runs_up_is_found(module, source):
    assert len(complaints(source, module, is_package=module == "mii_hcache")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "mii_hcache.core.planner",
            "import math\nfrom .cost import LayerCost\nfrom mii_hcache.errors import ConfigError",
        ),
        ("mii_hcache.storage.file", "import crc32c\nfrom ..core import identity\nfrom mii_hcache import __version__"),
        ("mii_hcache.runtime.saver", "import torch\nfrom mii_hcache.storage.base import ChunkStore"),
        ("mii_hcache.engine.compat", "import deepspeed, mii\nfrom transformers import AutoConfig"),
        ("mii_hcache.serve.app", "from fastapi import FastAPI\nfrom mii_hcache.engine import open_service"),
    ],
)
def test_an_import_that_runs_down_is_not(module, source):
    assert complaints(source, module) == []
