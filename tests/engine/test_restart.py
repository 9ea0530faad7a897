"""State that outlives the engine: restarts, and every kind of damage to the state directory.

The answers must stay those of an engine that never left, whatever happened to the files; counters and `miss_reason`
say what did.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from mii_hcache.config import HCacheConfig
from mii_hcache.storage.open import open_state
from mii_hcache.storage.tiered import TieredStore
from tests.engine_kit import VOCAB, Client, open_client, poisoned_engine

PROMPTS = [random.Random(seed).choices(range(3, VOCAB), k=length) for seed, length in enumerate((130, 300, 520))]
DRAM_BYTES = 1 << 20  # smaller than the state, so that reads come from files


@contextmanager
def running(model_dir: Path, state_dir: Path, *, method: str = "hidden", keep: str = "none", dram: int = DRAM_BYTES):
    """A service over the saved state in `state_dir`."""
    state = open_state(state_dir, 256 << 20, dram, io=HCacheConfig().io)
    assert isinstance(state.store, TieredStore)
    state.store._put_wait_s = 20.0  # all is saved, however busy the machine is
    engine = poisoned_engine(model_dir, num_blocks=200, max_batch_tokens=256)
    client = open_client(engine, store=state.store, method=method, keep=keep)
    try:
        yield client
    finally:
        client.service.close()
        state.close()


@pytest.fixture(scope="module")
def expected(tiny_model) -> list[tuple[int, ...]]:
    client = open_client(poisoned_engine(tiny_model("llama"), num_blocks=200), method="recompute", keep="none")
    told = [client.ask([*prompt, 7, 8, 9], 12).token_ids for prompt in PROMPTS]
    client.service.close()
    return told


def _fill(client: Client) -> None:
    for prompt in PROMPTS:
        client.ask(prompt, 2)


@pytest.mark.parametrize("method", ["hidden", "kv"])
@pytest.mark.parametrize("keep", ["none", "lru"])
def test_a_restart_restores_everything_from_files(tiny_model, tmp_path, expected, method, keep):
    with running(tiny_model("llama"), tmp_path, method=method, keep=keep) as client:
        _fill(client)
    with running(tiny_model("llama"), tmp_path, method=method, keep=keep) as client:
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            result = client.ask([*prompt, 7, 8, 9], 12)
            assert result.token_ids == tokens
            assert result.report.restored_tokens == 64 * (len(prompt) // 64)
            assert (result.report.restored_from, result.report.method) == ("file", method)
            assert result.report.miss_reason is None


def test_another_models_state_is_not_found(tiny_model, tmp_path):
    with running(tiny_model("llama"), tmp_path) as client:
        _fill(client)
    with running(tiny_model("llama"), tmp_path) as client:
        client.service._fingerprint = b"another"
        report = client.ask(PROMPTS[1], 2).report
        assert (report.cached_tokens, report.miss_reason) == (0, "not_saved")


def _segments(state_dir: Path) -> list[Path]:
    return sorted(path for path in state_dir.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20)


def _flip_bits(state_dir: Path, chance: random.Random) -> None:
    for path in _segments(state_dir):
        with path.open("r+b") as file:
            written = [at for at in range(0, path.stat().st_size, 4096) if os.pread(file.fileno(), 64, at).strip(b"\0")]
            for at in chance.sample(written, min(len(written), 40)):
                at += chance.randrange(4096)
                byte = os.pread(file.fileno(), 1, at)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << chance.randrange(8)]), at)


def _truncate(state_dir: Path, chance: random.Random) -> None:
    for path in _segments(state_dir):
        os.truncate(path, chance.randrange(512 * path.stat().st_blocks))  # what is behind was never written


def _delete_segments(state_dir: Path, chance: random.Random) -> None:
    for path in _segments(state_dir):
        path.unlink()


def _delete_catalog(state_dir: Path, chance: random.Random) -> None:
    for path in state_dir.rglob("catalog.sqlite*"):
        path.unlink()


def _garble_catalog(state_dir: Path, chance: random.Random) -> None:
    for path in state_dir.rglob("catalog.sqlite"):
        content = bytearray(path.read_bytes())
        for _ in range(200):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)


def _delete_all_but_the_catalog(state_dir: Path, chance: random.Random) -> None:
    for path in state_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _flip_anywhere(state_dir: Path, chance: random.Random) -> None:
    files = [path for path in state_dir.rglob("*") if path.is_file() and path.stat().st_size]
    for path in files:
        with path.open("r+b") as file:
            for _ in range(3):
                at = chance.randrange(min(path.stat().st_size, 1 << 22))
                byte = os.pread(file.fileno(), 1, at)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 0x10]), at)


DAMAGES: dict[str, tuple[Callable[[Path, random.Random], None], bool]] = {
    "flip bits in segments": (_flip_bits, True),
    "truncate segments": (_truncate, True),
    "delete segments": (_delete_segments, True),
    "delete the catalog": (_delete_catalog, True),
    "garble the catalog": (_garble_catalog, False),
    "delete all but the catalog": (_delete_all_but_the_catalog, True),
    "flip anywhere": (_flip_anywhere, False),
}
"""Name: what is done, and whether it must be noticed (garbage may hit unused bytes)."""


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_never_served(tiny_model, tmp_path, expected, damage, seed):
    inflict, must_be_noticed = DAMAGES[damage]
    with running(tiny_model("llama"), tmp_path) as client:
        _fill(client)
    assert _segments(tmp_path), "without segments the test would damage nothing"
    inflict(tmp_path, random.Random(f"{damage}/{seed}"))
    with running(tiny_model("llama"), tmp_path) as client:
        cut = 0
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            result = client.ask([*prompt, 7, 8, 9], 12)
            assert result.token_ids == tokens
            report = result.report
            assert report.restored_tokens + report.prefill_tokens == len(prompt) + 3
            if report.restored_tokens < 64 * (len(prompt) // 64):
                cut += 1
                assert report.miss_reason is not None or report.restored_tokens > 0
        if must_be_noticed:
            assert cut > 0
        # What a restore stumbled on has been saved again. It does not look at what lies behind, which the next may
        # stumble on; each gets further, so that all of it is whole after a few.
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            num_whole, restored = 64 * (len(prompt) // 64), -1
            while restored < num_whole:
                again = client.ask([*prompt, 7, 8, 9], 12)
                assert again.token_ids == tokens
                assert again.report.restored_tokens > restored, "what was damaged was not saved again"
                restored = again.report.restored_tokens
            assert again.report.miss_reason is None


def test_damage_while_serving_cuts_the_prefix_and_says_so(tiny_model, tmp_path, expected):
    with running(tiny_model("llama"), tmp_path) as client:
        _fill(client)
    with running(tiny_model("llama"), tmp_path) as client:
        _flip_bits(tmp_path, random.Random(3))
        results = [client.ask([*prompt, 7, 8, 9], 12) for prompt in PROMPTS]
        assert [result.token_ids for result in results] == expected
        assert "corrupt" in {result.report.miss_reason for result in results}
        metrics = client.service.metrics()
        assert metrics["store_corrupt_chunks_total"] > 0
        assert metrics["restore_cuts_total"] > 0
