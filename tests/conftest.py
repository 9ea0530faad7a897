"""Tiny seeded models on disk, and engines whose freed blocks are poisoned.

Environment first: no test may reach for a hub, and two cores are shared with the engine's own threads. Without a GPU
our Triton kernels run in Triton's interpreter, which has to be said before anything imports Triton.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only get in each other's way

if not any(
    map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia", "/usr/lib/wsl/lib/libcuda.so.1"))
):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

with suppress(ImportError):  # where only the GPU's tests run
    import hypothesis

    hypothesis.settings.register_profile("busy", deadline=None)  # a machine that is busy for a moment is no failure
    hypothesis.settings.load_profile("busy")

from tests import chaos

chaos.begin_if_asked()

LONG = ("tests/native/test_csrc.py", "tests/engine/parallel/", "tests/end_to_end/", "tests/kernels/")
"""What takes minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: when files run side by side, none of them is left for the end, with one core at work."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(name)`: directory of a seeded checkpoint, made on first use. Names: see `engine_kit.TINY_CONFIGS`."""
    from tests.engine_kit import save_tiny_model

    root = tmp_path_factory.mktemp("models")

    def path_of(name: str) -> Path:
        path = root / name
        if not path.exists():
            save_tiny_model(name, path)
        return path

    return path_of
