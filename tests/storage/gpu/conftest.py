"""A GPU that is none, and a store whose chunks can be read into it."""

from __future__ import annotations

from contextlib import closing

import pytest

from mii_hcache.storage import native
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.state_dir import StateDir
from tests.native.gpu_kit import Fakes, load_fakes

ROOM_BYTES = 16 << 20


@pytest.fixture(scope="session")
def loaded(tmp_path_factory) -> Fakes:
    kernels = tmp_path_factory.mktemp("kernels") / "_gpu.fatbin"
    fakes = load_fakes(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_KERNELS", kernels)
        yield fakes


@pytest.fixture
def fakes(loaded):
    with loaded.in_use():
        yield loaded


@pytest.fixture
def gpu(fakes):
    """Another user of the GPU, as torch would be."""
    with closing(native.new_cufile(0, 4, 1)) as gpu:
        yield gpu


@pytest.fixture
def room(gpu):
    """Device memory."""
    address = gpu.allocate(ROOM_BYTES)
    yield address
    gpu.free(address)


@pytest.fixture
def store(fakes, tmp_path):
    with closing(StateDir(tmp_path)) as state_dir, closing(FileStore(state_dir, 1 << 28, io="cufile")) as store:
        yield store
