"""When cuFile is used, when it is not, and who is told why; on fakes of NVIDIA's libraries."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from contextlib import closing

import pytest
from crc32c import crc32c

from mii_hcache.errors import ConfigError
from mii_hcache.storage import native, open_io
from mii_hcache.storage.cufile_proof import TAIL_BYTES, WHOLE_BYTES, prove
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.throttled import ThrottledStore
from mii_hcache.storage.tiered import TieredStore
from mii_hcache.tools import state_checks
from tests.storage.storage_kit import holds, make_record, put


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("flip_at", 12_345, "cuFile brought 1 of 1049577 bytes wrong"),
        ("flip_at", WHOLE_BYTES + TAIL_BYTES - 1, "cuFile brought 1 of 1049577 bytes wrong"),
        ("register_error", 5008, "Operation not supported"),
        ("error", -5044, "Input/output error"),
        ("short", 0, "cuFile read 0 of 1048576 bytes"),
    ],
)
def test_a_path_that_is_wrong_is_found_at_once(fakes, store, tmp_path, caplog, name, value, why):
    if name in ("error", "short"):
        fakes.fail(-1, value)
    else:
        fakes.cufile[name] = value
    assert store.device_reader(0) is None
    assert why in caplog.text and "nothing is read straight into GPU 0" in caplog.text
    assert not list(tmp_path.glob("cufile-trial*"))
    record = make_record("a", chunk_bytes=8192)
    assert put(store, record) and holds(store, record)
    fakes.cufile.reset()
    assert store.device_reader(0) is None, "the answer does not change"


def test_a_gpu_that_computes_wrong_checksums_is_found(fakes, gpu, tmp_path):
    class Liar:
        def __init__(self, answers):
            self.answers = answers

        def __getattr__(self, name):
            return getattr(gpu, name)

        def crc32c(self, pieces):
            return self.answers(pieces)

    assert prove(gpu, tmp_path) is None
    assert prove(Liar(lambda pieces: [1] * len(pieces)), tmp_path) == "the GPU's checksums are not the CPU's"
    first = []

    def stuck(pieces):  # right once, then always the same
        first.append(gpu.crc32c(pieces))
        return first[0] if len(first) == 1 else first[1]

    assert prove(Liar(stuck), tmp_path) == "the GPU's checksums miss a flipped bit"


def test_memory_that_is_not_to_be_had(fakes, store, caplog):
    fakes.cuda["allocate_error"] = 1
    assert store.device_reader(0) is None
    assert "CUDA_ERROR_OUT_OF_MEMORY" in caplog.text
    assert store.device_reader(7) is None  # there is no such GPU
    assert "cuDeviceGet" in caplog.text


@pytest.mark.parametrize("length", [0, 1, 63, 64, 4095, 4096, 4097, (512 << 10) - 1, 512 << 10, (512 << 10) + 1])
def test_checksums_are_those_of_the_package(gpu, room, length):
    for place in (0, 16, 5):
        payload = random.Random(length).randbytes(length)
        if payload:
            gpu.copy_in(room + place, payload)
        assert gpu.crc32c([(room + place, length)]) == [crc32c(payload)]


def test_other_stores_offer_nothing(fakes, tmp_path):
    with closing(StateDir(tmp_path)) as state_dir, closing(FileStore(state_dir, 1 << 26, io="threads")) as file:
        memory = MemoryStore(1 << 20)
        for store in (file, memory, TieredStore(memory, file), ThrottledStore(file, 1e9)):
            assert store.device_reader(0) is None


def test_the_choice_is_explained(fakes, monkeypatch, tmp_path):
    name, reason = open_io.choose_io("cufile")
    assert name == "cufile" and "compatibility mode" in reason and "never ran it on a GPU" in reason
    assert open_io.choose_io("auto")[0] != "cufile", "experimental: only for who asks"
    fakes.cufile["nvfs"] = 2
    assert "nvidia-fs 2.17" in open_io.choose_io("cufile")[1]
    monkeypatch.setenv("MII_HCACHE_IO", "cufile")
    findings = {name: check() for name, check in state_checks.state_checks([tmp_path])}
    assert findings["I/O"].state == "ok" and findings["I/O"].reason.startswith("cufile: asked for")
    found = findings["cuFile"]
    assert (found.state, found.advice) == ("ok", "--io cufile")
    assert found.reason.startswith("Fake GPU: nvidia-fs 2.17") and "never run on a GPU" in found.reason
    fakes.cufile["flip_at"] = 3
    assert "bytes wrong" in dict(state_checks.state_checks([tmp_path]))["cuFile"]().reason
    fakes.cuda["gpus"] = 0
    assert dict(state_checks.state_checks([tmp_path]))["cuFile"]().reason.startswith("there is no GPU; ")
    with pytest.raises(ConfigError, match="io: cufile cannot be had, there is no GPU; choose auto"):
        open_io.open_io("cufile")
    fakes.cuda["gpus"] = 1
    monkeypatch.setattr(native, "_KERNELS", tmp_path / "none")
    with pytest.raises(ConfigError, match="nothing goes unverified"):
        open_io.open_io("cufile")


@pytest.mark.skipif(native.why_not_built() is not None, reason=str(native.why_not_built()))
def test_without_the_libraries(tmp_path):
    """As on most machines. In a process of its own: libraries are loaded once."""
    code = (
        "from pathlib import Path; from mii_hcache.storage import native, open_io\n"
        f"native._KERNELS = Path({str(tmp_path)!r})\n"
        "try: open_io.open_io('cufile')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    missing = str(tmp_path / "libcuda.so.1")
    environment = {**os.environ, "MII_HCACHE_CUDA_LIB": missing}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"ConfigError io: cufile cannot be had, no GPU can be used ({missing}"), done.stdout


def test_the_log_says_what_is_used(fakes, store, caplog):
    caplog.set_level(logging.INFO)
    assert store.device_reader(0) is not None
    assert "chunks are read straight into GPU 0 (Fake GPU)" in caplog.text


def run_on_gpu(folder, **environment):
    command = [sys.executable, "-m", "tests.storage.gpu.on_gpu", str(folder)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=250)


def test_on_a_gpu(tmp_path):
    done = run_on_gpu(tmp_path)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not native._KERNELS.exists(), reason="no nvcc was there when the package was built")
def test_the_program_for_a_gpu_runs(loaded, tmp_path):
    """On the fakes, so that it is no surprise on the day when there is a GPU."""
    libraries = {"MII_HCACHE_CUDA_LIB": str(loaded.cuda.path), "MII_HCACHE_CUFILE_LIB": str(loaded.cufile.path)}
    done = run_on_gpu(tmp_path, **libraries)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "a flipped bit on the disk is corrupt"
