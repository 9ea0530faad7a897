"""The sweep: one history, every method, in turn; and the same from a device that is emulated.

The time is a restore's from the moment at which its blocks are reserved to the moment at which the device idles: all
reads, copies and computing are in it, and nothing was read before. Reading comes from host memory whose bytes are in no
cache any more. Of a method that plans, the plan is made after its restores have taught it as in a server, and then
kept, so that all repetitions do the same work. Behind the first restore of each method a token is run, and its logits
compared with what the engine said when the history was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from experiments.gpu_restore.bounds import Ceilings, Work, work_of
from experiments.gpu_restore.ledger import Number
from experiments.gpu_restore.rig import History, Rig
from experiments.gpu_restore.targets import Numbers
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime.policy import RestoreChoice, RestorePolicy
from mii_hcache.runtime.restore import RestoreOutcome
from mii_hcache.runtime.restorer import Restorer

LESSONS = 2
"""Restores that teach a method's planner before its plan is kept."""
RECOMPUTE = "recompute"


@dataclass(kw_only=True)
class Way:
    """One method on one history."""

    restore: Callable[[], object]
    """Adds the uid of the sequence that came back to a list, where the caller takes it from to evict it."""
    work: Callable[[], Work]
    plan: str
    planned_s: float | None = None
    difference: float = 0.0
    """Of the logits behind it, from those of the history as it was computed."""


def sweep(rig: Rig, methods: Sequence[str], num_tokens: int, numbers: Callable[[], Numbers]) -> Iterator[Number]:
    """From host memory. `numbers`: what was measured so far, for the bounds."""
    yield from _race(rig, methods, num_tokens, "restore", num_tokens, numbers, None)


def emulated(
    rig: Rig, methods: Sequence[str], num_tokens: int, read_bytes_per_s: float, numbers: Callable[[], Numbers]
) -> Iterator[Number]:
    """Through reads of that speed. x is the speed in GB/s."""
    yield from _race(rig, methods, num_tokens, "emulated", read_bytes_per_s / 1e9, numbers, read_bytes_per_s)


def _race(
    rig: Rig,
    methods: Sequence[str],
    num_tokens: int,
    panel: str,
    x: float,
    numbers: Callable[[], Numbers],
    read_bytes_per_s: float | None,
) -> Iterator[Number]:
    store = rig.store if read_bytes_per_s is None else rig.throttled(read_bytes_per_s)
    restorer = rig.restorer(store)
    costs = rig.costs if store is rig.store else rig.costs_of(store)
    policies = {name: rig.policy(name, costs) for name in methods}
    token_ids = rig.history(num_tokens)
    probe = rig.tokens(1, "probe")
    histories = rig.saved(
        num_tokens, {name: policy.storage for name, policy in policies.items() if policy.storage is not None}
    )
    uid = rig.new_uid()
    rig.prefill(uid, token_ids)
    said = rig.prefill(uid, probe).float()
    rig.engine.evict(uid)
    live: list[int] = []
    ways = {}
    for name in methods:
        history = histories.get(name)
        if history is None:
            ways[name] = recomputing(rig, token_ids, live)
        else:
            ways[name] = restoring(rig, policies[name], history, restorer, live)
        ways[name].restore()
        ways[name].difference = float((rig.prefill(live[-1], probe).float() - said).abs().max())
        rig.engine.evict(live.pop())

    def evict(_: str) -> None:
        rig.engine.evict(live.pop())

    samples = rig.clock.race({name: way.restore for name, way in ways.items()}, rig.scale.repeats, after=evict)
    how = "measured" if read_bytes_per_s is None else "emulated"
    ceilings = Ceilings.of(numbers(), rig.name, read_bytes_per_s)
    for name, way in ways.items():
        series, work = f"{rig.name} {name}", way.work()
        yield from samples[name].numbers(panel, series, x, how=how, note=f"{num_tokens} tokens, {way.plan}")
        extras: list[tuple[str, float | None, str]] = [
            ("read", work.read_bytes, "bytes"),
            ("flop", work.product_flop + work.attention_flop, "FLOP"),
            ("planned", way.planned_s, "s"),
            ("difference", way.difference, "logit"),
        ]
        store_bytes_per_s = max(
            numbers().get("store", f"{rig.name} {kind.value}", "memory") or 0.0 for kind in ChunkKind
        )
        if store_bytes_per_s and read_bytes_per_s is None:
            extras.append(("store-bound", work.read_bytes / store_bytes_per_s, "s"))
        if ceilings is not None:
            extras += [("bound", ceilings.bound_s(work), "s"), ("compute-bound", ceilings.compute_s(work), "s")]
        for statistic, value, unit in extras:
            if value is not None:
                yield Number(panel=f"{panel}.{statistic}", series=series, x=x, y=value, unit=unit, how=how)


def recomputing(rig: Rig, token_ids: list[int], live: list[int]) -> Way:
    """By the engine's own prefill, in its largest batches."""

    def run() -> None:
        live.append(rig.new_uid())
        rig.prefill_freely(live[-1], token_ids)

    work = work_of(
        rig.geometry,
        num_tokens=len(token_ids),
        read_bytes=0,
        hidden_rows=0,
        recompute_tokens=0,
        recompute_layers=0,
        is_prefill=True,
    )
    return Way(restore=run, work=lambda: work, plan=f"prefill in pieces of {rig.engine.max_batch_tokens}")


def restoring(rig: Rig, policy: RestorePolicy, history: History, restorer: Restorer, live: list[int]) -> Way:
    """From the store."""
    choice = _taught(rig, policy, history, restorer)
    outcomes: list[RestoreOutcome] = []

    def run() -> None:
        live.append(rig.new_uid())
        if choice.is_prefill:
            rig.prefill_freely(live[-1], history.token_ids)
        else:
            outcomes.append(rig.restore(live[-1], history, choice, restorer)[0])

    def work() -> Work:
        return _work(rig, history, choice, outcomes[-1].read_bytes if outcomes else 0)

    storage = history.storage
    layers = f", {choice.recompute_layers} layers computed" if choice.recompute_layers > 1 else ""
    plan = f"stored as {storage.summary}, {choice.recompute_tokens} tokens computed{layers}"
    planned_s = None if choice.plan is None else choice.plan.timeline.makespan_s
    return Way(restore=run, work=work, plan=plan, planned_s=planned_s)


def _taught(rig: Rig, policy: RestorePolicy, history: History, restorer: Restorer) -> RestoreChoice:
    """The choice after some restores, each of which the planner learns from."""
    for _ in range(LESSONS):
        choice = rig.choose(policy, history)
        if choice.is_prefill:
            break
        uid = rig.new_uid()
        _, restore = rig.restore(uid, history, choice, restorer)
        rig.clock.settle()
        rig.engine.evict(uid)
        if restore.is_settled:
            policy.learn(choice, restore, history.records)
    return rig.choose(policy, history)


def _work(rig: Rig, history: History, choice: RestoreChoice, read_bytes: int) -> Work:
    spans = history.records[choice.recompute_tokens // SPAN_TOKENS :]
    depth = max([choice.recompute_layers, *(record.layout.first_stored for record in spans)])
    first = depth if depth > 1 else 0
    hidden_rows = SPAN_TOKENS * sum(record.layout.kinds[first:].count(ChunkKind.HIDDEN) for record in spans)
    return work_of(
        rig.geometry,
        num_tokens=history.num_tokens,
        read_bytes=read_bytes,
        hidden_rows=hidden_rows,
        recompute_tokens=choice.recompute_tokens,
        recompute_layers=depth if spans else 0,
        is_prefill=choice.is_prefill,
    )
