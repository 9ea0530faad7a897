"""The real engine saves and restores on a device whose side streams run late and out of order, and gives the tokens of
one that never evicted anything.

Freed blocks and freed host buffers hold poison, the norm reuses its output buffer, and every access of torch's to the
blocks, the ring and the host buffers is checked to come after what it must (`tests/fake_device.py`).
"""

from __future__ import annotations

import contextlib
import random
import time
from functools import partial

import pytest

from mii_hcache.core.cost import LayerCost
from mii_hcache.engine.service import EngineService
from mii_hcache.runtime.generation import FinishReason
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver
from mii_hcache.runtime.tiles import LocalTiles
from mii_hcache.storage.memory import MemoryStore
from tests.engine_kit import VOCAB, Client, Conversation, answers, interleave, open_client, poisoned_engine, restorable
from tests.fake_device import FakeStreams
from tests.runtime.device_kit import device_restorer, text_of, waits_in
from tests.runtime.kit import wait_until

COST = LayerCost(io_hidden_s=2e-5, io_kv_s=4e-5, c_hidden_s=5e-6, c_kv_s=1e-7, c_token_s=3e-5)
"""Hidden states, and a part recomputed while they are read."""
CHEAP = LayerCost(io_hidden_s=2e-6, io_kv_s=4e-6, c_hidden_s=5e-6, c_kv_s=1e-7, c_token_s=3e-5)
"""Some layers as K and V."""


TALK = partial(interleave, num_conversations=3, num_turns=3)


class DeviceClient(Client):
    """A service whose restores go through a fake device."""

    def __init__(self, service: EngineService, streams: FakeStreams, restorer: Restorer) -> None:
        super().__init__(service)
        self.streams = streams
        self.restorer = restorer

    def close(self) -> None:
        """End the service; nothing raced, and all that was lent is back."""
        self.service.close()
        self.streams.run_all()  # what comes too late comes now
        assert not self.streams.checker.races
        assert self.restorer.buffers.num_in_use == 0
        assert self.streams.checker.num_accesses > 0 and len(self.streams.side) == 3  # save, load, compute


@pytest.fixture
def on_a_device(monkeypatch):
    """`on_a_device(engine, seed, **settings)`: a client of it."""

    def open_one(
        engine, seed: int, *, tile_spans: int = 2, haste: float = 0.05, ignored=None, **settings
    ) -> DeviceClient:
        streams = FakeStreams(seed, haste=haste, granule_bytes=64, ignored=ignored)
        blocks = engine._state_manager._kv_cache._caches[0]
        streams.checker.watch(blocks, "the blocks", streams.main.actor)
        made: list[Restorer] = []

        def make(*, adapter, store, counters, read_deadline_s, open_tiles, gathering):
            assert open_tiles is LocalTiles and gathering is None  # one rank, whose tiles are this process's
            with streams.watching():
                made.append(device_restorer(streams, adapter, store, counters=counters, tile_spans=tile_spans))
            return made[-1]

        run = EngineService._run

        def watched(self: EngineService) -> None:
            streams.checker.acquire(started)  # a thread comes after who started it
            with streams.watching():
                run(self)

        started = streams.checker.release()
        monkeypatch.setattr("mii_hcache.engine.service.Restorer", make)
        monkeypatch.setattr("mii_hcache.engine.service.Saver", partial(Saver, streams=streams))
        monkeypatch.setattr(EngineService, "_run", watched)
        service = open_client(engine, **settings).service
        monkeypatch.undo()
        return DeviceClient(service, streams, made[0])

    return open_one


@pytest.fixture(scope="module")
def never_evicted(tiny_model):
    """Answers of a server that saves nothing and evicts nothing, on an ordinary CPU."""
    known: dict[tuple, list] = {}

    def of(family: str, talk=TALK) -> list:
        key = family, tuple(talk.keywords.items())
        if key not in known:
            engine = poisoned_engine(tiny_model(family), num_blocks=600, max_batch_tokens=256)
            client = open_client(engine, method="recompute", keep="none")
            known[key] = answers(talk(client))
            client.service.close()
        return known[key]

    return of


WAYS = [("hidden", None), ("kv", None), ("hcache", COST), ("auto", COST), ("auto", CHEAP)]


@pytest.mark.parametrize(
    ("family", "method", "cost"),
    [
        *(("llama", *way) for way in WAYS),
        *(("llama-gqa", *way) for way in WAYS),
        *(("qwen3", *WAYS[0]), ("opt", *WAYS[3])),
    ],
)
def test_restored_tokens(tiny_model, never_evicted, on_a_device, family, method, cost):
    seed = random.Random(f"{family} {method}").randrange(1000)
    engine = poisoned_engine(tiny_model(family), max_batch_tokens=256, num_blocks=150)
    client = on_a_device(engine, seed, method=method, keep="none", costs=cost and {"memory": cost})
    conversations = TALK(client)
    metrics = client.service.metrics()
    client.close()
    assert answers(conversations) == never_evicted(family)
    assert metrics.get("restore_errors_total", 0) == 0 and metrics["restored_tokens_total"] > 0
    if cost is None:
        for conversation in conversations:
            for before, turn in zip(conversation.turns, conversation.turns[1:], strict=False):
                assert turn.report.restored_tokens == restorable(before)


@pytest.mark.parametrize("seed", range(4))
def test_many_orders(tiny_model, never_evicted, on_a_device, seed):
    """Tiles of all sizes, streams that hurry or hardly move, blocks that are short, residents and none."""
    chooser = random.Random(seed)
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=64, num_blocks=chooser.choice([42, 60, 150]))
    client = on_a_device(
        engine,
        seed,
        tile_spans=chooser.randint(1, 4),
        haste=chooser.choice([0.0, 0.01, 0.2, 0.8]),
        method=chooser.choice(["hidden", "kv"]),
        keep=chooser.choice(["none", "lru"]),
        restore_slice_s=chooser.choice([0.0002, 0.005]),
    )
    talk = partial(interleave, num_conversations=5, num_turns=2, num_tokens=30)
    told = answers(talk(client))
    client.close()
    assert told == never_evicted("llama", talk)
    assert engine.num_free_blocks == engine.num_blocks


@pytest.mark.parametrize("wait", ["stream.wait(self._begun)", "self._main.wait(self._projected)", "is_done"])
def test_a_wait_that_is_left_out_shows(tiny_model, on_a_device, wait):
    """Or the tests above would prove nothing. Which orders the streams take is chance, so there are several tries."""
    places = [*waits_in("placing.py", {"wait"}), *waits_in("held_memory.py", {"is_done"})]
    ignored = next(place for place in places if wait in text_of(*place))
    for seed in range(8, 28):
        engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256, num_blocks=150)
        client = on_a_device(engine, seed, method="hidden", keep="none", haste=0.0, ignored=(*ignored, ""))
        client.streams.checker.is_silent = True  # else the engine's thread would end by what it is told
        with contextlib.suppress(AssertionError):  # logits that are not finite, for what was read was poison
            interleave(client, 2, 2)
        client.streams._ignored = None
        client.service.close()
        client.streams.run_all()
        assert client.streams.num_ignored > 0
        if client.streams.checker.races:
            return
    raise AssertionError(f"the tests do not notice that {wait} is left out")


class DamagingStore(MemoryStore):
    """Some spans are damaged when they are read, late in their history's restore."""

    def __init__(self, chooser: random.Random) -> None:
        super().__init__(1 << 30)
        self._chooser = chooser
        self.num_damaged = 0

    def get_into(self, reads):
        outcome = super().get_into(reads)
        if outcome.num_ok and reads[0].layer_idx >= 2 and self._chooser.random() < 0.15:
            self.num_damaged += 1
            num_ok = self._chooser.randrange(outcome.num_ok)
            for read in reads[num_ok:]:
                read.out[:] = b"\xff" * read.out.nbytes
            return type(outcome)(num_ok=num_ok, reason="corrupt")
        return outcome


@pytest.mark.parametrize("method", ["hidden", "kv"])
def test_damage_cuts_what_was_launched_already(tiny_model, never_evicted, on_a_device, method):
    store = DamagingStore(random.Random(method))
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256, num_blocks=150)
    talk = partial(interleave, num_conversations=3, num_turns=4)
    client = on_a_device(engine, 5, method=method, keep="none", store=store)
    told = answers(talk(client))
    client.close()
    assert told == never_evicted("llama", talk)
    assert store.num_damaged > 0


def test_cancelled_restores_leave_blocks_that_others_can_have(tiny_model, on_a_device):
    engine = poisoned_engine(tiny_model("llama"), num_blocks=150)
    client = on_a_device(engine, 6, keep="none", haste=0.01, restore_slice_s=0.0002)
    reference = open_client(poisoned_engine(tiny_model("llama")), method="recompute", keep="none")
    chooser = random.Random(5)
    prompts = [chooser.choices(range(3, VOCAB), k=600) for _ in range(3)]
    for prompt in prompts:
        client.ask(prompt, 2)
    for turn in range(3):
        sent = [client.send([*prompt, turn], 50) for prompt in prompts]
        time.sleep(chooser.choice([0.005, 0.02, 0.05]))
        for name in list(client.service._jobs):
            client.service.cancel(name)
        assert {results.get(timeout=60).finish_reason for results in sent} <= {*FinishReason}
        fresh = chooser.choices(range(3, VOCAB), k=500)
        assert client.ask(fresh, 4).token_ids == reference.ask(fresh, 4).token_ids
        kept = [*prompts[turn], 7]
        assert client.ask(kept, 4).token_ids == reference.ask(kept, 4).token_ids
    reference.service.close()
    client.close()
    assert engine.num_free_blocks == engine.num_blocks


def test_what_the_last_restore_read_is_given_back_though_nobody_asks_again(tiny_model, on_a_device):
    """Until it is, spans that a store lends are not evicted, and stay in memory when they are deleted."""
    engine = poisoned_engine(tiny_model("llama"), num_blocks=150)
    client = on_a_device(engine, 9, keep="none", haste=0.0)
    prompt = random.Random(9).choices(range(3, VOCAB), k=900)
    client.ask(prompt, 2)
    assert client.ask([*prompt, 7], 2).report.restored_tokens == 896
    client.streams.run_all()  # the device is done with all that was launched
    wait_until(lambda: client.restorer.buffers.num_in_use == 0)
    client.close()


def test_others_decode_while_a_device_is_late(tiny_model, on_a_device):
    """A job goes on before its device is done with the restore, and what that took is known later."""
    engine = poisoned_engine(tiny_model("llama"), num_blocks=150)
    client = on_a_device(engine, 7, keep="none", haste=0.0, restore_slice_s=0.001)
    conversation = Conversation(seed=3)
    prompt = conversation.next_prompt(400)
    conversation.take(prompt, client.ask(prompt, 10))
    running = client.send([3, 4, 5], 200)
    again = conversation.next_prompt(20)
    result = client.ask(again, 10)
    assert result.report.restored_tokens == restorable(conversation.turns[0])
    assert running.get(timeout=60).finish_reason is FinishReason.LENGTH
    client.streams.run_all()
    wait_until(lambda: client.service.metrics().get("restore_compute_seconds_total", 0) > 0)
    assert client.service.metrics()["restore_io_seconds_total"] > 0
    client.close()
