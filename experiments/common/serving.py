"""A server with many sessions, in discrete events: continuous batching with a token budget, restores beside it.

    session   Poisson arrival; rounds that wait `think_s` after each answer
    round     waits for KV memory -> its history is restored (one at a time, in order of arrival) or, by recomputation,
              prefilled -> its prompt is prefilled in chunks beside decoding -> it decodes, one token a step
    step      as many tokens as the budget has: one for each decoding round, the rest prefills in order of arrival
    restore   runs beside steps; its computing takes GPU time from them and goes first

State is evicted at the end of every round, as in the paper. Times are simulated; the same trace gives the same times.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from experiments.common.models import Deployment
from experiments.common.simulator import CHUNK_TOKENS, restored
from experiments.common.workloads import Round, Session
from mii_hcache.core.geometry import SPAN_TOKENS

MOST_OF_THE_GPU = 0.95
"""That a restore gets while steps want it too: restoration is a phase of its own in the paper, so it goes first."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """An engine on a deployment."""

    deployment: Deployment
    kv_capacity_tokens: int
    hbm_bytes_per_s: float
    """All GPUs together: reading weights and K and V."""
    step_start_s: float
    """Of a step, besides what its tokens cost: launches and the host's share."""
    budget_tokens: int = CHUNK_TOKENS
    restores_get: float = MOST_OF_THE_GPU
    """Most of the computing time that restores take from steps."""

    @property
    def weights_s(self) -> float:
        """Reading every weight once: no step is faster."""
        geometry = self.deployment.geometry
        width = (geometry.num_heads + geometry.num_kv_heads) * geometry.head_size
        weights = geometry.num_layers * (2 * geometry.hidden_size * width + geometry.ffn_weights)
        return weights * geometry.dtype_bytes / self.hbm_bytes_per_s

    def step_s(self, num_decoding: int, context_tokens: int, chunks: Iterable[tuple[int, int]]) -> float:
        """One step. `context_tokens`: history of all decoding rounds. `chunks`: (tokens before it, its tokens)."""
        cost, geometry = self.deployment.cost, self.deployment.geometry
        num_tokens, pairs = num_decoding, 0.0
        for start, count in chunks:
            num_tokens += count
            pairs += count * start + count * (count + 1) / 2
        kv_bytes = 4 * geometry.num_kv_heads * geometry.head_size * geometry.num_layers
        linear_s = max(self.weights_s, geometry.num_layers * cost.c_token_s * num_tokens)
        attention_s = (
            geometry.num_layers * cost.c_attention_s * pairs + context_tokens * kv_bytes / self.hbm_bytes_per_s
        )
        return self.step_start_s + linear_s + attention_s

    def prefill_s(self, history_tokens: int, num_tokens: int) -> float:
        """`num_tokens` behind a history, alone on the machine, in steps."""
        total_s, start, stop = 0.0, history_tokens, history_tokens + num_tokens
        while start < stop:
            count = min(self.budget_tokens, stop - start)
            total_s += self.step_s(0, 0, [(start, count)])
            start += count
        return total_s

    def first_token_s(self, series: str, history_tokens: int, prompt_tokens: int) -> float:
        """Time to the first token of a round that has the machine to itself."""
        if series == "Ideal":
            return self.prefill_s(history_tokens, prompt_tokens)
        kept = 0 if series == "Recomputation" else history_tokens // SPAN_TOKENS * SPAN_TOKENS
        restore_s = restored(self.deployment, series, kept).timeline.makespan_s if kept else 0.0
        return restore_s + self.prefill_s(kept, history_tokens - kept + prompt_tokens)


@dataclass(kw_only=True)
class Served:
    """One round: what happened to it, in seconds since the start."""

    session_idx: int
    round_idx: int
    round: Round
    arrived_s: float
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0
    restore_left_s: float = 0.0
    restore_share: float = 0.0
    """Computing in its restore, of the restore's time."""
    prefilled_tokens: int = 0
    """Tokens in memory: restored or resident history, then what was prefilled."""
    tokens_left: int = 0

    @property
    def need_tokens(self) -> int:
        """KV memory, from admission to the end."""
        return self.round.history_tokens + self.round.prompt_tokens + self.round.output_tokens

    @property
    def ttft_s(self) -> float:
        """Arrival to first token."""
        return self.first_token_s - self.arrived_s

    @property
    def tbt_s(self) -> float:
        """Mean time between its tokens; 0 for a single one."""
        more = self.round.output_tokens - 1
        return (self.finished_s - self.first_token_s) / more if more else 0.0


@dataclass(kw_only=True)
class _Run:
    """The state of one simulation."""

    server: Server
    series: str
    sessions: Sequence[Session]
    think_s: float
    now_s: float = 0.0
    free_tokens: int = 0
    arrivals: list[tuple[float, int, int]] = field(default_factory=list)
    waiting: deque[Served] = field(default_factory=deque)
    restoring: deque[Served] = field(default_factory=deque)
    prefilling: list[Served] = field(default_factory=list)
    decoding: list[Served] = field(default_factory=list)
    done: list[Served] = field(default_factory=list)

    def admit(self) -> None:
        """Everything that has arrived and, in order of arrival, fits."""
        while self.arrivals and self.arrivals[0][0] <= self.now_s:
            arrived_s, session_idx, round_idx = heapq.heappop(self.arrivals)
            served = Served(
                session_idx=session_idx,
                round_idx=round_idx,
                round=self.sessions[session_idx].rounds[round_idx],
                arrived_s=arrived_s,
            )
            self.waiting.append(served)
        while self.waiting and self.waiting[0].need_tokens <= self.free_tokens:
            served = self.waiting.popleft()
            self.free_tokens -= served.need_tokens
            served.admitted_s = self.now_s
            self._start(served)

    def _start(self, served: Served) -> None:
        history = served.round.history_tokens
        if self.series == "Ideal":
            served.prefilled_tokens = history
        elif self.series != "Recomputation" and history >= SPAN_TOKENS:
            kept = history // SPAN_TOKENS * SPAN_TOKENS
            timeline = restored(self.server.deployment, self.series, kept).timeline
            served.prefilled_tokens, served.restore_left_s = kept, timeline.makespan_s
            served.restore_share = min(1.0, timeline.compute_s / timeline.makespan_s)
            self.restoring.append(served)
            return
        self.prefilling.append(served)

    def restore_alone(self) -> None:
        """No step wants the GPU: full speed, until it is done or somebody arrives."""
        head = self.restoring[0]
        until_s = self.arrivals[0][0] - self.now_s if self.arrivals else head.restore_left_s
        took_s = min(head.restore_left_s, until_s)
        self.now_s += took_s
        self._restore(head, took_s)

    def _restore(self, head: Served, progress_s: float) -> None:
        head.restore_left_s -= progress_s
        if head.restore_left_s <= 1e-12:
            self.prefilling.append(self.restoring.popleft())

    def step(self) -> None:
        """One step of the engine, with restores beside it."""
        budget = self.server.budget_tokens - len(self.decoding)
        chunks: list[tuple[Served, int]] = []
        for served in self.prefilling:
            left = served.round.history_tokens + served.round.prompt_tokens - served.prefilled_tokens
            if budget <= 0:
                break
            chunks.append((served, min(left, budget)))
            budget -= chunks[-1][1]
        context = sum(served.need_tokens - served.tokens_left for served in self.decoding)
        work_s = self.server.step_s(
            len(self.decoding), context, [(served.prefilled_tokens, count) for served, count in chunks]
        )
        self._spend(work_s)
        self._emit()
        for served, count in chunks:
            self._prefilled(served, count)

    def _spend(self, work_s: float) -> None:
        """`work_s` of GPU time for the step, shared with the restores that run meanwhile."""
        while work_s > 0 and self.restoring:
            head = self.restoring[0]
            share = min(head.restore_share, self.server.restores_get)
            rate = share / head.restore_share if head.restore_share else 1.0
            took_s = min(work_s / (1 - share), head.restore_left_s / rate)
            work_s -= took_s * (1 - share)
            self.now_s += took_s
            self._restore(head, took_s * rate)
        self.now_s += max(0.0, work_s)

    def _emit(self) -> None:
        for served in list(self.decoding):
            served.tokens_left -= 1
            if served.tokens_left == 0:
                self.decoding.remove(served)
                self._finish(served)

    def _prefilled(self, served: Served, count: int) -> None:
        served.prefilled_tokens += count
        if served.prefilled_tokens < served.round.history_tokens + served.round.prompt_tokens:
            return
        self.prefilling.remove(served)
        served.first_token_s, served.tokens_left = self.now_s, served.round.output_tokens - 1
        if served.tokens_left:
            self.decoding.append(served)
        else:
            self._finish(served)

    def _finish(self, served: Served) -> None:
        served.finished_s = self.now_s
        self.free_tokens += served.need_tokens
        self.done.append(served)
        if served.round_idx + 1 < len(self.sessions[served.session_idx].rounds):
            follow_up = (self.now_s + self.think_s, served.session_idx, served.round_idx + 1)
            heapq.heappush(self.arrivals, follow_up)


def serve(
    server: Server, series: str, sessions: Sequence[Session], *, think_s: float = 30.0, until_s: float | None = None
) -> list[Served]:
    """Every round in order of its end; with `until_s`, those that ended by then. Raises ValueError for a round that the
    memory can never hold."""
    for session in sessions:
        for one in session.rounds:
            need = one.history_tokens + one.prompt_tokens + one.output_tokens
            if need > server.kv_capacity_tokens:
                raise ValueError(
                    f"a round of {need} tokens must fit in {server.kv_capacity_tokens} tokens of KV memory"
                )
    run = _Run(
        server=server,
        series=series,
        sessions=sessions,
        think_s=think_s,
        free_tokens=server.kv_capacity_tokens,
        arrivals=[(session.start_s, idx, 0) for idx, session in enumerate(sessions) if session.rounds],
    )
    heapq.heapify(run.arrivals)
    while until_s is None or run.now_s < until_s:
        run.admit()
        if run.decoding or run.prefilling:
            run.step()
        elif run.restoring:
            run.restore_alone()
        elif run.arrivals:
            run.now_s = run.arrivals[0][0]
        else:
            break
    return run.done
