from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from mii_hcache.core.layout import SpanLayout
from mii_hcache.storage.native import why_not_built
from tests.storage.damage_kit import RECORDS
from tests.storage.namespace_kit import Site
from tests.storage.storage_kit import IO, LAYOUTS, StoreKit, put

settings.register_profile("unhurried", deadline=None)  # other work on the machine is no failure
settings.load_profile("unhurried")

needs_native = pytest.mark.skipif(why_not_built() is not None, reason=str(why_not_built()))


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> SpanLayout | None:
    """Every layout in turn."""
    return LAYOUTS[request.param]


KINDS = ["file", "tiered", "striped2", "striped3"]
if IO == "auto":  # these ask for no backend: nothing new is seen of them with another one
    KINDS = ["memory", *KINDS, pytest.param("namespace", marks=needs_native)]


@pytest.fixture(params=KINDS)
def kit(request: pytest.FixtureRequest, tmp_path: Path, layout: SpanLayout | None) -> Iterator[StoreKit]:
    """Every kind of store in turn, with spans of every layout."""
    kit = StoreKit(request.param, tmp_path / "state", layout)
    yield kit
    kit.close()


@pytest.fixture
def file_kit(tmp_path: Path) -> Iterator[StoreKit]:
    kit = StoreKit("file", tmp_path / "state")
    yield kit
    kit.close()


@pytest.fixture
def saved(file_kit: StoreKit) -> StoreKit:
    """A closed store with RECORDS in it: spans of two sizes, so two segments."""
    store = file_kit.open()
    for record in RECORDS:
        assert put(store, record)
    file_kit.close()
    return file_kit


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A namespace and its state directory."""
    site = Site(tmp_path)
    yield site
    site.close()
