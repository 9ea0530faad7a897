"""A server of ours in a process of its own, as an experiment needs it: one method, one pool, one speed of reading."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import httpx

from experiments.common.checkpoints import make_model
from experiments.common.models import METHOD_OF
from mii_hcache.storage.state_dir import PROFILE_FILE

START_LIMIT_S = 600.0
STOP_LIMIT_S = 60.0
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served, and how."""

    model_dir: Path
    series: str
    """The paper's name of the method, or the method's own."""
    keep: str = "none"
    """`none` evicts after every round, `lru` when blocks are needed."""
    num_blocks: int
    """Of 16 tokens, in the pool."""
    read_bytes_per_s: float | None = None
    """At most so many bytes of saved state are read in a second; None does not slow reads down."""

    @property
    def method(self) -> str:
        """The server's name of it."""
        return METHOD_OF.get(self.series, self.series)

    @property
    def is_emulated(self) -> bool:
        """Whether anything that this method does is slowed down."""
        return self.read_bytes_per_s is not None and self.method not in ("recompute", "ideal")

    @property
    def how(self) -> str:
        """For rows."""
        return "emulated" if self.is_emulated else "measured"

    def arguments(self) -> list[str]:
        """Of the command line."""
        words = ["--model", str(self.model_dir), "--method", self.method, "--keep", self.keep]
        words += ["--kv-blocks", str(self.num_blocks)]
        if self.is_emulated:
            words += ["--emulate-read-speed", str(round(self.read_bytes_per_s or 0))]
        return words


def model_folder(name: str, folder: Path) -> Path:
    """A checkpoint of random weights that a server can load. It gets the demo model's tokenizer, as clients send and
    take token ids; of other vocabularies it knows a part."""
    from mii_hcache.engine.demo_model import ensure_demo_model

    path = make_model(name, folder)
    if not (path / "tokenizer.json").exists():
        demo = ensure_demo_model(folder / "demo-tokenizer")
        for file in _TOKENIZER_FILES:
            if (demo / file).exists():
                shutil.copyfile(demo / file, path / file)
    return path


@lru_cache(maxsize=1)
def _profiles() -> tempfile.TemporaryDirectory[str]:
    """Of this process: older ones may have been measured while the machine was busy."""
    return tempfile.TemporaryDirectory(prefix="mii_hcache-profiles-")


@contextmanager
def serving(served: Served) -> Iterator[str]:
    """The server's URL for the time of a `with` block. Its state lies in a folder that is removed in the end; all
    servers of one process with one model and one speed of reading plan from the same profile, which the first of them
    measures. Raises RuntimeError with the end of its log when it does not start or does not end well."""
    speed = f"{served.read_bytes_per_s:.0f}" if served.is_emulated else "own"
    known_profile = Path(_profiles().name) / f"{served.model_dir.name}-{speed}.json"
    with tempfile.TemporaryDirectory(prefix="mii_hcache-served-") as folder:
        state_dir, log_path = Path(folder) / "state", Path(folder) / "log"
        profile = state_dir / PROFILE_FILE
        if known_profile.exists():
            state_dir.mkdir()
            shutil.copyfile(known_profile, profile)
        command = [sys.executable, "-m", "mii_hcache.serve", "--port", "0", "--state-dir", str(state_dir)]
        environment = {name: value for name, value in os.environ.items() if name != "MII_HCACHE_API_KEY"}
        with log_path.open("w") as log:
            process = subprocess.Popen(
                [*command, *served.arguments()], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        try:
            url = _wait_until_ready(process, log_path)
            if profile.exists():
                shutil.copyfile(profile, known_profile)
            yield url
            process.send_signal(signal.SIGTERM)
            if process.wait(timeout=STOP_LIMIT_S) != 0:
                raise RuntimeError(f"the server ended with {process.returncode}: {_end_of(log_path)}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log_path: Path) -> str:
    """Its URL: the port is its own choice."""
    stop_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < stop_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server did not start ({process.returncode}): {_end_of(log_path)}")
        found = re.search(r"address  (http://\S+)\s", log_path.read_text(errors="replace"))
        if found is not None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{found[1]}/health", timeout=5, trust_env=False).status_code == 200:
                    return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {START_LIMIT_S:g} s: {_end_of(log_path)}")


def _end_of(log_path: Path) -> str:
    return " | ".join(log_path.read_text(errors="replace").splitlines()[-5:])
