"""The fake GPU, for what reaches it by the CUDA driver."""

from __future__ import annotations

from contextlib import closing

import pytest

from mii_hcache.storage import native
from tests.native.gpu_kit import FakeGpu, load_fakes


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
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
    with closing(FakeGpu(fakes.cuda)) as gpu:
        yield gpu
