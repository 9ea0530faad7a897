"""The engine on its own thread, behind `runtime.generation.GenerationService`."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from mii_hcache.config import HCacheConfig
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ModelGeometry
from mii_hcache.core.identity import chain_seed
from mii_hcache.core.methods import Method
from mii_hcache.engine.job import Job
from mii_hcache.engine.parallel.engine import ParallelEngine
from mii_hcache.engine.parallel.state import SharedState
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.engine.scheduler import HCacheScheduler
from mii_hcache.errors import HCacheError, QueueFullError, RankLostError, RequestError
from mii_hcache.runtime.generation import GenerationRequest, GenerationResult
from mii_hcache.runtime.pieces import pieces_on
from mii_hcache.runtime.pinned import gauges as pinned_gauges
from mii_hcache.runtime.policy import make_policy
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver
from mii_hcache.runtime.scatter import make_scatter
from mii_hcache.runtime.sightings import Sightings
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.tiles import LocalTiles
from mii_hcache.runtime.timeline import TraceFile
from mii_hcache.storage.base import ChunkStore

_log = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0
"""What a refused request is told to wait."""
TIDY_S = 0.02
"""How often an engine without work looks whether its device is done with what the last restores left to it."""
LOSS_WAIT_S = 2.0
"""Longest that the engine's thread is waited for once a rank is lost: it may hang in a call to the others."""


class EngineService:
    """One engine, one thread. `submit`, `cancel`, `metrics` and `close` may be called from any thread."""

    def __init__(
        self,
        *,
        engine: HCacheEngine,
        store: ChunkStore,
        method: Method,
        fingerprint: bytes,
        config: HCacheConfig,
        costs: Mapping[str, LayerCost] | None = None,
        shared: SharedState | None = None,
    ) -> None:
        """Takes the engine over. `costs`: of this machine and model, by tier; methods with a plan need them. `shared`:
        the way to the other ranks' state, where it is open already. Raises ConfigError."""
        self._engine = engine
        self._store = store
        self._fingerprint = fingerprint
        self._counters = Counters()
        self._max_context_tokens = engine.max_context_tokens
        self.policy = make_policy(
            method=method,
            geometry=engine.geometry,
            costs=costs,
            max_context_tokens=self._max_context_tokens,
            counters=self._counters,
            max_fill_tokens=engine.max_fill_tokens,
            pieces=pieces_on(engine.device),
            num_ranks=1 if engine.group is None else engine.group.size,
        )
        is_saving = self.policy.storage is not None
        if isinstance(engine, ParallelEngine) and is_saving and shared is None:
            shared = SharedState(
                engine, store, io=config.io, emulated_read_bytes_per_s=config.emulated_read_bytes_per_s
            )
        self.shared = shared if is_saving else None
        """The state of the other ranks, where there are any and something is saved."""
        losses_s = self.policy.losses_s(list(costs or ("",))[-1], 1 + self._max_context_tokens // SPAN_TOKENS)
        if losses_s:
            store.weigh(lambda span_idx: losses_s[min(span_idx, len(losses_s) - 1)])
        trace = None if config.trace is None else TraceFile(Path(config.trace))  # before there are threads to end
        sightings = Sightings(save_after=config.save_after)
        self._saver = (Saver if self.shared is None else self.shared.open_saver)(
            adapter=engine.own,
            store=store,
            plan=self.policy.storage,
            max_batch_tokens=engine.max_batch_tokens,
            counters=self._counters,
            save=config.save,
            save_wait=config.save_wait,
            scatter=make_scatter(config.scatter_threads),
            num_threads=config.save_threads,
            ring_batches=3,  # with two, a full batch may find no room that lies together while one is in flight
            is_worth_saving=sightings.is_worth_saving,
        )
        self._restorer = Restorer(
            adapter=engine.own,
            store=store,
            counters=self._counters,
            # an emulated disk may be as slow as it likes
            read_deadline_s=math.inf if config.emulated_read_bytes_per_s else config.disk_deadline_s,
            open_tiles=LocalTiles if self.shared is None else self.shared.open_tiles,
            gathering=None if self.shared is None else self.shared.gathering,
        )
        self._scheduler = HCacheScheduler(
            engine=engine,
            store=store,
            saver=self._saver,
            restorer=self._restorer,
            policy=self.policy,
            trace=trace,
            counters=self._counters,
            keep="none" if config.keep == "none" and method.name != "ideal" else "lru",
            restore_slice_s=config.restore_slice_s,
            max_sequences=config.max_sequences,
            sightings=sightings,
        )
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._jobs: dict[str, Job] = {}
        self._order = itertools.count()
        self._is_closing = False
        self._failure: RankLostError | None = None
        self._lost_s = math.inf
        """When the failure was told."""
        self._max_waiting = config.max_waiting
        self._vocab_size = int(engine.model().vocab_size)
        self._geometry = engine.geometry
        self._thread = threading.Thread(target=self._run, name="hcache-engine", daemon=True)
        self._thread.start()

    @property
    def geometry(self) -> ModelGeometry:
        return self._geometry

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def max_context_tokens(self) -> int:
        return self._max_context_tokens

    def submit(self, request: GenerationRequest) -> None:
        self._check(request)
        job = Job(
            request=replace(request, on_finish=_once(request.on_finish)),
            seed=chain_seed(self._fingerprint, request.tenant_salt),
            order=next(self._order),
            token_ids=list(request.prompt_token_ids),
        )
        with self._changed:
            if self._failure is not None:
                raise HCacheError(str(self._failure))
            if self._is_closing:
                raise HCacheError("the server is shutting down")
            if request.request_id in self._jobs:
                raise RequestError(f"request id {request.request_id!r} is running already", param="request_id")
            num_waiting = self._scheduler.num_waiting + len(self._commands)
            if num_waiting >= self._max_waiting:
                self._counters.add("requests_refused_total")
                raise QueueFullError(
                    f"{num_waiting} requests are waiting, which is the most; try again later",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._jobs[request.request_id] = job
            self._commands.append(lambda: self._scheduler.add(job))
            self._changed.notify_all()

    def _check(self, request: GenerationRequest) -> None:
        prompt = request.prompt_token_ids
        limit = self._max_context_tokens
        if not prompt:
            raise RequestError("the prompt has no tokens", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise RequestError(f"token ids must be in [0, {self._vocab_size})", param="prompt")
        if len(prompt) + request.sampling.max_new_tokens > limit:
            raise RequestError(
                f"the context holds {limit} tokens; {len(prompt)} in the prompt and "
                f"{request.sampling.max_new_tokens} to generate are {len(prompt) + request.sampling.max_new_tokens}",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def cancel(self, request_id: str) -> None:
        with self._changed:
            job = self._jobs.get(request_id)
            if job is not None:
                self._commands.append(lambda: self._scheduler.cancel(job))
                self._changed.notify_all()

    def metrics(self) -> dict[str, float]:
        store = self._store.stats()
        counters = self._counters.snapshot()
        restored_tokens = counters.get("restored_tokens_total", 0.0)
        return {
            **counters,
            "saved_bytes_per_restored_token": counters.get("saved_bytes_total", 0.0) / max(1.0, restored_tokens),
            **self._scheduler.gauges(),
            **pinned_gauges(),
            "store_spans": store.num_spans,
            "store_bytes": store.num_bytes,
            "store_capacity_bytes": store.capacity_bytes,
            "store_put_bytes_total": store.put_bytes,
            "store_read_bytes_total": store.read_bytes,
            "store_evicted_spans_total": store.evicted_spans,
            "store_evicted_ahead_spans_total": store.evicted_ahead_spans,
            "store_put_waits_total": store.put_waits,
            "store_dropped_spans_total": store.dropped_spans,
            "store_corrupt_chunks_total": store.corrupt_chunks,
            "store_unavailable_total": store.unavailable,
            "store_devices_away": store.num_away,
        }

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs; False when it died or was closed, and from the moment on that a rank of a
        model over several is known to be lost."""
        return self._failure is None and self._thread.is_alive()

    @property
    def rank_states(self) -> Mapping[int, str]:
        """What each process of a model over several does; empty for one."""
        return self._engine.rank_states

    def lose(self, error: RankLostError) -> None:
        """A rank is gone, and the engine will never run again: every request ends with `error`, within `LOSS_WAIT_S`,
        also when the engine's own thread hangs. Not for that thread. What was accepted for saving is still saved."""
        with self._changed:
            self._failure = self._failure or error
            self._lost_s = time.monotonic()
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(LOSS_WAIT_S)
        with self._changed:
            jobs = list(self._jobs.values())
        self._end_all(jobs, error)

    def drain_saves(self, timeout_s: float | None = None) -> bool:
        """Wait until all accepted state has reached the store."""
        return self._saver.drain(timeout_s)

    def close(self, *, drain: bool = True) -> None:
        with self._changed:
            self._is_closing = True
            if not drain:
                for job in self._jobs.values():
                    self._commands.append(lambda job=job: self._scheduler.cancel(job))  # type: ignore[misc]
            self._changed.notify_all()
        if self._thread is threading.current_thread():
            return
        while self._thread.is_alive() and time.monotonic() < self._lost_s + LOSS_WAIT_S:
            self._thread.join(0.1)
        if self._thread.is_alive():
            _log.warning("the engine's thread hangs, or waits for reads; what it held is left to the process's end")
            self._saver.drain(LOSS_WAIT_S)

    # --- engine thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._scheduler.iterate()
                self._forget_finished()
        except RankLostError as error:
            self._fail(error)
        except BaseException:
            _log.critical("the engine thread died", exc_info=True)
            raise
        finally:
            with self._changed:
                self._is_closing = True
                jobs = list(self._jobs.values())
            try:
                if self._failure is None:
                    self._scheduler.close()
                else:
                    self._scheduler.abandon()
            except RankLostError as error:
                self._fail(error)
            finally:  # those that the scheduler has not told: nobody may wait for ever
                self._end_all(jobs, self._failure or HCacheError("the engine stopped"))
                self._saver.stop()
                self._restorer.stop()
                self._engine.close()

    def _fail(self, error: RankLostError) -> None:
        """What the engine's thread met, or what happened to the rank behind it."""
        reason = self._engine.lose(error)
        with self._changed:
            self._failure = self._failure or reason

    @staticmethod
    def _end_all(jobs: Iterable[Job], error: HCacheError) -> None:
        """Also those that were over, where the engine failed before it could say so; who has heard hears no more."""
        for job in jobs:
            if job.finish_reason is None:
                job.fail(HCacheError(str(error)))
            job.request.on_finish(job.result())

    def _take_commands(self) -> bool:
        """Run what was asked for; wait when there is nothing to do. False when it is time to end."""
        is_tidy = False
        while True:
            with self._changed:
                if self._commands or self._scheduler.has_work:
                    commands, self._commands = self._commands, []
                    break
                if self._is_closing:
                    return False
                self._changed.wait(None if is_tidy else TIDY_S)
            is_tidy = not self._scheduler.tidy()
        for command in commands:
            command()
        return True

    def _forget_finished(self) -> None:
        with self._changed:  # others submit meanwhile
            if any(job.finish_reason is not None for job in self._jobs.values()):
                self._jobs = {name: job for name, job in self._jobs.items() if job.finish_reason is None}


def _once(on_finish: Callable[[GenerationResult], None]) -> Callable[[GenerationResult], None]:
    """The first result counts: a request that was ended for a lost rank may be ended by a thread that hung, too."""
    lock = threading.Lock()
    told = False

    def tell(result: GenerationResult) -> None:
        nonlocal told
        with lock:
            is_first, told = not told, True
        if is_first:
            on_finish(result)

    return tell
