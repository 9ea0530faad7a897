"""What the README names exists: scripts, options, files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    page
    for top in ROOT.iterdir()
    if not top.name.startswith(".")
    for page in ([top] if top.is_file() else top.rglob("*"))
    if page.suffix == ".md"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def options(text: str) -> set[str]:
    """Long options in `text`, without lines that call other programs."""
    lines = [line for line in text.splitlines() if not re.match(r"\s*(pip|git|python3?) ", line)]
    return set(OPTION.findall(re.sub(r"`pip [^`]*`", "", "\n".join(lines))))


def test_it_opens_with_the_two_commands():
    opening = README[: README.index("## ")]
    assert opening.index("scripts/serve.sh") < opening.index("scripts/test.sh")
    assert README.index("curl ") < README.index("from openai import OpenAI") < README.index("## How it works")


def test_scripts_exist():
    named = set(re.findall(r"(?<![\w/.])scripts/[\w./-]*\w", README))
    assert {"scripts/serve.sh", "scripts/test.sh"} <= named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_options_exist():
    if not (ROOT / "mii_hcache" / "serve" / "__main__.py").exists():
        pytest.skip("mii_hcache.serve has no command yet")
    known: set[str] = set()
    for command in ("serve", "plan", "profile", "bench storage", "fsck", "gc"):
        asked = [sys.executable, "-m", "mii_hcache", *command.split(), "--help"]
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        known |= options(done.stdout)
    unknown = options(README) - known
    assert not unknown, f"the README names options that no command's --help does: {sorted(unknown)}"


def test_options_of_other_programs_do_not_count():
    assert options("pip install --no-deps x\n`pip install --user`\nuse `--model` or --keep=lru") == {
        "--model",
        "--keep",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_python_examples_compile():
    for source in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(source, "README.md", "exec")
