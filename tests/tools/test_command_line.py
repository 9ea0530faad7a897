"""`python -m mii_hcache`: the door to all commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mii_hcache import __version__
from mii_hcache.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def test_an_unknown_command_lists_the_commands(capsys):
    for arguments in (["fly"], []):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert not out and all(f"\n  {name} " in err for name in COMMANDS)
    assert main(["fly"]) == 2 and "there is no command 'fly'" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out and summary in out for name, (_, summary) in COMMANDS.items())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mii_hcache {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_itself_by_example(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m mii_hcache{'.' if name == 'serve' else ' '}{name}" in out.split("examples:")[1]


def test_serve_gets_its_options(capsys):
    assert main(["serve", "--state-dir", __file__]) == 2
    assert "--state-dir must be a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("selfcheck", "doctor", "inspect", "bench", "fsck", "gc"))]
)
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys; from mii_hcache.__main__ import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'deepspeed', 'transformers', 'fastapi') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_interrupt_is_no_traceback(monkeypatch):
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("mii_hcache.tools.doctor.main", interrupted)
    assert main(["doctor"]) == 130


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "."]])
def test_whoever_reads_may_have_seen_enough(arguments, tmp_path):
    command = [sys.executable, "-m", "mii_hcache", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stdout is not None and done.stderr is not None
    done.stdout.close()
    assert done.stderr.read() == "" and done.wait(60) == 128 + signal.SIGPIPE
