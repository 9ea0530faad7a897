"""What a user feels: the first token behind a history that was away, and the pace of answers while state is saved or
another history comes back.

The engine, the saver and the restorer are driven as the server's scheduler does it, one step after the other, without
HTTP and without queues.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from experiments.gpu_restore.ledger import Number
from experiments.gpu_restore.restores import recomputing, restoring
from experiments.gpu_restore.rig import History, Rig
from experiments.gpu_restore.timing import quantile
from mii_hcache.config import HCacheConfig
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.plans import uniform_storage
from mii_hcache.engine.ragged_engine import token_tensors
from mii_hcache.runtime.policy import RestoreChoice
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver, StepSegment

IDEAL = "ideal"
STRETCH_STEPS = 16
"""Steps of one way in a row, before the other one's turn: a machine that gets slower is slower for both."""
SLICE_S = HCacheConfig().restore_slice_s


def first_token(rig: Rig, methods: Sequence[str], num_tokens: int) -> Iterator[Number]:
    """From the moment at which a prompt of new tokens behind the history is there to the moment at which its first
    token is on the host. `ideal`: the history never left."""
    policies = {name: rig.policy(name, rig.costs) for name in methods}
    token_ids = rig.history(num_tokens)
    new = rig.tokens(rig.scale.new_tokens, "new")
    histories = rig.saved(
        num_tokens, {name: policy.storage for name, policy in policies.items() if policy.storage is not None}
    )
    resident = rig.new_uid()
    rig.prefill(resident, token_ids)
    live: list[int] = []

    def ask(uid: int) -> None:
        int(rig.prefill_freely(uid, new).argmax())

    def ideal() -> None:
        ask(resident)

    works: dict[str, Callable[[], object]] = {}
    plans = {IDEAL: "it never left"}
    for name in methods:
        history = histories.get(name)
        way = (
            recomputing(rig, token_ids, live)
            if history is None
            else restoring(rig, policies[name], history, rig.restorer(), live)
        )
        plans[name] = way.plan

        def work(restore: Callable[[], object] = way.restore) -> None:
            restore()
            ask(live[-1])

        works[name] = work
    works[IDEAL] = ideal

    def after(name: str) -> None:
        if name == IDEAL:
            rig.engine.truncate(resident, num_tokens)
        else:
            rig.engine.evict(live.pop())

    samples = rig.clock.race(works, rig.scale.repeats, after=after)
    rig.engine.evict(resident)
    for name, sample in samples.items():
        note = f"{num_tokens} tokens and {len(new)} new ones, {plans[name]}"
        yield from sample.numbers("ttft", f"{rig.name} {name}", num_tokens, note=note)


@dataclass(frozen=True, kw_only=True)
class _Pace:
    """Gaps between the tokens of a batch."""

    gaps_s: list[float]

    def numbers(self, series: str, batch: int, note: str) -> Iterator[Number]:
        for statistic, share in (("", 0.5), (".p99", 0.99)):
            value = quantile(self.gaps_s, share)
            yield Number(
                panel=f"decode{statistic}",
                series=series,
                x=batch,
                y=value,
                unit="s",
                note=f"{note}; {len(self.gaps_s)} steps",
            )


class _Batch:
    """Sequences of one context length that decode together, from the same place again and again."""

    def __init__(self, rig: Rig, size: int) -> None:
        self._rig = rig
        self.length = rig.scale.decode_context
        self.uids = [rig.new_uid() for _ in range(size)]
        self.histories = [rig.tokens(self.length, f"batch/{size}/{idx}") for idx in range(size)]
        for uid, history in zip(self.uids, self.histories, strict=True):
            rig.prefill(uid, history)
        self._tokens = [history[0] for history in self.histories]

    def go_back(self, length: int) -> None:
        for uid in self.uids:
            self._rig.engine.truncate(uid, length)

    def step(self, saver: Saver | None = None) -> None:
        """One token for each; it is on the host when this returns, as the scheduler needs it."""
        model = self._rig.engine.model()
        if saver is not None:
            model.qkv_input_tap = saver
            saver.begin_step(
                [StepSegment(uid=uid, token_ids=[token]) for uid, token in zip(self.uids, self._tokens, strict=True)]
            )
        logits = self._rig.engine.put(self.uids, token_tensors([[token] for token in self._tokens]))
        if saver is not None:
            saver.end_step()
            model.qkv_input_tap = None
        self._tokens = logits.argmax(-1).tolist()

    def close(self) -> None:
        for uid in self.uids:
            self._rig.engine.evict(uid)


def _gaps(batch: _Batch, num_steps: int, saver: Saver | None = None) -> list[float]:
    """From token to token by the host's clock. The device is not waited for beyond the tokens: what still runs beside
    them is the point."""
    times_s = [time.perf_counter()]
    for _ in range(num_steps):
        batch.step(saver)
        times_s.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(times_s)]


def saving(rig: Rig, size: int) -> Iterator[Number]:
    """Decoding with nothing saved, and with hidden states saved in two stages, in turn."""
    batch = _Batch(rig, size)
    storage = uniform_storage(rig.engine.geometry, ChunkKind.HIDDEN)
    saver = rig.new_saver(storage, save_wait=HCacheConfig().save_wait)
    found: dict[str, list[float]] = {"alone": [], "saving": []}
    dropped = rig.counters.get("dropped_rows_total")
    saved_before = rig.counters.get("saved_spans_total")
    steps = rig.scale.decode_steps
    try:
        for uid, history in zip(batch.uids, batch.histories, strict=True):
            saver.open(uid, seed=f"{rig.name}/decode/{size}/{uid}".encode(), token_ids=history)
        _gaps(batch, STRETCH_STEPS)
        batch.go_back(batch.length)
        _gaps(batch, STRETCH_STEPS, saver)
        position = batch.length + STRETCH_STEPS
        for stretch in range(2 * (steps // STRETCH_STEPS)):
            name = ("alone", "saving")[(stretch + stretch // 2) % 2]  # a b b a: neither is always the first one
            found[name] += _gaps(batch, STRETCH_STEPS, saver if name == "saving" else None)
            if name == "saving":
                position += STRETCH_STEPS
            batch.go_back(position)
        saver.drain()
        for uid in batch.uids:
            saver.close(uid)
    finally:
        saver.stop()
        rig.engine.model().qkv_input_tap = None
        batch.close()
    lost = rig.counters.get("dropped_rows_total") - dropped
    saved = rig.counters.get("saved_spans_total") - saved_before
    note = f"{size} sequences of {batch.length} tokens; {saved:.0f} spans saved, {lost:.0f} rows dropped"
    for name, gaps_s in found.items():
        yield from _Pace(gaps_s=gaps_s).numbers(f"{rig.name} {name}", size, note)


def beside(rig: Rig, size: int, ways: Mapping[str, Restorer]) -> Iterator[Number]:
    """The pace of a batch while another history comes back as hidden states, in slices between the steps: gaps from
    token to token, the slice in them. `ways`: restorers that differ in what their streams may take from decoding."""
    batch = _Batch(rig, size)
    storage = uniform_storage(rig.engine.geometry, ChunkKind.HIDDEN)
    history = rig.saved(rig.scale.beside_tokens, {"hidden": storage})["hidden"]
    try:
        for name, restorer in ways.items():
            _beside_once(rig, batch, history, restorer)  # to warm up
            alone, gaps_s, restore_s = [], [], []
            for _ in range(3):
                alone += _gaps(batch, STRETCH_STEPS)
                batch.go_back(batch.length)
                gaps, took_s = _beside_once(rig, batch, history, restorer)
                gaps_s += gaps
                restore_s.append(took_s)
                batch.go_back(batch.length)
            note = f"{size} sequences of {batch.length} tokens beside {history.num_tokens} tokens as hidden states"
            note += f", slices of {1e3 * SLICE_S:g} ms"
            series = f"{rig.name} beside a restore, {name}"
            yield from _Pace(gaps_s=gaps_s).numbers(series, size, note)
            yield from _Pace(gaps_s=alone).numbers(f"{rig.name} before it, {name}", size, note)
            yield Number(panel="decode.restore", series=series, x=size, y=quantile(restore_s, 0.5), unit="s", note=note)
    finally:
        batch.close()


def _beside_once(rig: Rig, batch: _Batch, history: History, restorer: Restorer) -> tuple[list[float], float]:
    """Gaps while it lasts, and how long it lasted."""
    uid = rig.new_uid()
    choice = RestoreChoice(recompute_tokens=0, recompute_layers=1, tiers=("memory",), plan=None)
    times_s = [time.perf_counter()]
    restore = rig.start(uid, history, choice, restorer)
    outcome = None
    while outcome is None and len(times_s) <= rig.scale.decode_steps:
        outcome = restore.step(SLICE_S, wait=False)
        batch.step()
        times_s.append(time.perf_counter())
    while outcome is None:  # more steps than a context has room for: the rest by itself
        outcome = restore.step(math.inf, wait=True)
    rig.clock.settle()
    took_s = time.perf_counter() - times_s[0]
    rig.engine.evict(uid)
    return [later - earlier for earlier, later in pairwise(times_s)], took_s
