from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.storage.storage_kit import StoreKit

settings.register_profile("unhurried", deadline=None)  # other work on the machine is no failure
settings.load_profile("unhurried")


@pytest.fixture(params=["memory", "file", "tiered"])
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreKit]:
    """Every kind of store in turn."""
    kit = StoreKit(request.param, tmp_path / "state")
    yield kit
    kit.close()


@pytest.fixture
def file_kit(tmp_path: Path) -> Iterator[StoreKit]:
    kit = StoreKit("file", tmp_path / "state")
    yield kit
    kit.close()
