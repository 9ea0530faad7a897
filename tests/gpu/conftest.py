"""Tests that a CPU cannot stand in for: each needs an NVIDIA GPU, and says so where there is none."""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Of every test in this folder, before its fixtures ask for a device."""
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch {torch.__version__} sees none")


@pytest.fixture
def device() -> torch.device:
    """The first GPU."""
    return torch.device("cuda", 0)
