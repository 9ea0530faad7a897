"""Conversations on two disks, one of which hangs and fails in the middle: the answers stay those of an engine that
never needed a disk, other requests go on, and the disk's return is noticed."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.native import why_no_uring
from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.stripe_set import StripeSet
from mii_hcache.storage.striped import StripedStore
from mii_hcache.storage.tiered import TieredStore
from tests.engine.conftest import PATIENCE_S
from tests.engine_kit import VOCAB, Client, open_client, poisoned_engine
from tests.storage.faults import DeadDisk
from tests.storage.storage_kit import wait_until_here

DEADLINE_S = 1.0
"""Of a disk that hangs. Others are waited for, however slow a busy machine makes them."""
PROMPTS = [random.Random(seed).choices(range(3, VOCAB), k=length) for seed, length in enumerate((300, 520))]

_why_not = why_no_uring()
NEEDS_URING = pytest.mark.skipif(_why_not is not None, reason=_why_not or "")


@contextmanager
def running(
    model_dir, folder, io_name, dram_bytes, deadline_s=PATIENCE_S
) -> Iterator[tuple[Client, StripedStore, ChunkStore]]:
    stripes = StripeSet.of([folder / "a", folder / "b"])
    files = open_striped(stripes, 256 << 20, io=io_name, deadline_s=deadline_s, first_look_s=0.01)
    store: ChunkStore = files
    if dram_bytes:  # a busy machine may write slowly; nothing is to be dropped before the disk hangs
        store = TieredStore(MemoryStore(dram_bytes), files, deadline_s=deadline_s, put_wait_s=20.0)
    engine = poisoned_engine(model_dir, num_blocks=200, max_batch_tokens=256)
    client = open_client(engine, store=store, keep="none", disk_deadline_s=deadline_s)
    try:
        yield client, files, store
    finally:
        client.service.close()
        store.close()


def expect(client: Client, store: FileStore, within_s: float) -> None:
    """How long a disk may take to answer."""
    store.presence.deadline_s = client.service._restorer.read_deadline_s = within_s


@pytest.mark.parametrize(("io_name", "dram_bytes"), [pytest.param("uring", 0, marks=NEEDS_URING), ("threads", 1 << 18)])
def test_one_of_two_disks_hangs_and_fails_in_a_conversation(tiny_model, tmp_path, monkeypatch, io_name, dram_bytes):
    model_dir = tiny_model("llama")
    oracle = open_client(poisoned_engine(model_dir, num_blocks=200), method="recompute", keep="none")
    prompts = [[*prompt, 7, 8, 9] for prompt in PROMPTS]
    expected = [oracle.ask(prompt, 12).token_ids for prompt in prompts]
    long_expected = oracle.ask(PROMPTS[0][:100], 200).token_ids
    oracle.service.close()
    with running(model_dir, tmp_path, io_name, dram_bytes) as (client, files, store):
        for prompt in PROMPTS:
            client.ask(prompt, 2)
        client.service.drain_saves()
        store.flush()  # also what DRAM has not given to the files yet
        num_saved = [64 * (len(prompt) // 64) for prompt in PROMPTS]
        assert all(store.stats().num_spans >= 5 for store in files.stores)
        disk = DeadDisk(monkeypatch, files.stores[1])

        expect(client, files.stores[1], DEADLINE_S)
        disk.hang()
        decoding = client.send(PROMPTS[0][:100], 200)  # goes on meanwhile
        started_s = time.monotonic()
        results = [client.ask(prompt, 12) for prompt in prompts]
        assert time.monotonic() - started_s < 40 * DEADLINE_S
        assert [result.token_ids for result in results] == expected
        if not dram_bytes:
            assert {result.report.miss_reason for result in results} <= {"stalled", "unavailable"}
            assert all(result.report.restored_tokens < num for result, num in zip(results, num_saved, strict=True))
        assert decoding.get(timeout=60).token_ids == long_expected
        metrics = client.service.metrics()
        assert metrics["store_devices_away"] == 1 and metrics["store_corrupt_chunks_total"] == 0

        disk.answer()
        wait_until_here(files.stores[1])
        expect(client, files.stores[1], PATIENCE_S)
        results = [client.ask(prompt, 12) for prompt in prompts]
        assert [result.token_ids for result in results] == expected
        assert [result.report.restored_tokens for result in results] == num_saved
        assert client.service.metrics()["store_devices_away"] == 0

        disk.error = 5
        results = [client.ask(prompt, 12) for prompt in prompts]
        assert [result.token_ids for result in results] == expected
        disk.error = 0
        wait_until_here(files.stores[1])
        results = [client.ask(prompt, 12) for prompt in prompts]
        assert [result.token_ids for result in results] == expected
        assert [result.report.restored_tokens for result in results] == num_saved
        assert client.service.metrics()["store_corrupt_chunks_total"] == 0


@pytest.mark.parametrize("io_name", [pytest.param("uring", marks=NEEDS_URING), "threads"])
def test_a_server_with_a_hanging_disk_still_closes(tiny_model, tmp_path, monkeypatch, io_name):
    with running(tiny_model("llama"), tmp_path, io_name, 0, DEADLINE_S) as (client, files, _):
        client.ask(PROMPTS[0], 2)
        disk = DeadDisk(monkeypatch, files.stores[1])
        disk.hang()
        client.send([*PROMPTS[0], 7], 5)
        time.sleep(0.05)
        started_s = time.monotonic()
        client.service.close(drain=False)
        files.close()
        assert time.monotonic() - started_s < 40 * DEADLINE_S
        disk.answer()
