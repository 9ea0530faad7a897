"""A store in files, and ranks that are closed at the end."""

from __future__ import annotations

import pytest

from mii_hcache.storage.file import FileStore
from mii_hcache.storage.state_dir import StateDir
from tests.runtime.ranks_kit import Ranks


@pytest.fixture
def store(tmp_path):
    state_dir = StateDir(tmp_path / "state")
    store = FileStore(state_dir, 64 << 20)
    yield store
    store.close()
    state_dir.close()


@pytest.fixture
def make_ranks():
    made = []

    def make(geometry, num_ranks, **settings):
        made.append(Ranks(geometry, num_ranks, **settings))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()
