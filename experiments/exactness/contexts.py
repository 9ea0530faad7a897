"""An engine with several savers at once, and contexts that are restored by a method's own plan."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.identity import spans_of
from mii_hcache.core.methods import METHODS
from mii_hcache.engine.ragged_engine import HCacheEngine, token_tensors
from mii_hcache.errors import HCacheError
from mii_hcache.runtime.lookup import look_up
from mii_hcache.runtime.policy import make_policy
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.tap import SharedTap
from mii_hcache.storage.memory import MemoryStore

SEED = b"exactness"
WAIT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method, and the made-up machine that it plans for: what a plan mixes must be exact, whatever is fast here."""

    name: str
    method: str
    read_s: float = 1.0
    """Of a hidden row; projecting it takes 1, a layer's forward 6."""

    def cost(self, geometry: ModelGeometry) -> LayerCost:
        """A layer's, in millionths of a second a token."""
        kv_over_hidden = geometry.row_bytes(ChunkKind.KV) / geometry.row_bytes(ChunkKind.HIDDEN)
        return LayerCost(
            io_hidden_s=1e-6 * self.read_s,
            io_kv_s=1e-6 * self.read_s * kv_over_hidden,
            c_hidden_s=1e-6,
            c_token_s=6e-6,
        )


WAYS = (
    Way(name="hidden", method="hidden"),
    Way(name="kv", method="kv"),
    Way(name="hcache, reads fast", method="hcache", read_s=0.5),
    Way(name="hcache, reads slow", method="hcache", read_s=9.0),
    Way(name="auto, reads fast", method="auto", read_s=0.7),
    Way(name="auto, reads slow", method="auto", read_s=9.0),
    Way(name="naive-hybrid", method="naive-hybrid", read_s=3.0),
    Way(name="cake", method="cake", read_s=3.0),
    Way(name="token-wise", method="token-wise", read_s=9.0),
)


class Saved:
    """A way's state on an engine, in memory."""

    def __init__(self, engine: HCacheEngine, way: Way, max_tokens: int) -> None:
        self.way = way
        self._engine = engine
        counters = Counters()
        self._policy = make_policy(
            method=METHODS[way.method],
            geometry=engine.geometry,
            costs={"memory": way.cost(engine.geometry)},
            max_context_tokens=engine.max_context_tokens,
            counters=counters,
            max_fill_tokens=engine.max_fill_tokens,
        )
        num_bytes = max_tokens * sum(engine.geometry.bytes_per_token(kind) for kind in ChunkKind)
        self._store = MemoryStore(num_bytes + (16 << 20))
        self.saver = Saver(
            adapter=engine,
            store=self._store,
            plan=self._policy.storage,
            max_batch_tokens=engine.max_batch_tokens,
            counters=counters,
        )
        self._restorer = Restorer(adapter=engine, store=self._store, counters=counters)
        self.told = ""
        """What the last restore was."""

    def bring_back(self, uid: int, prompt: Sequence[int], num_history: int) -> int:
        """Restore the first `num_history` tokens (whole spans) into a new sequence. Returns how many of them are to be
        prefilled, none or all: the plan may say so. Raises HCacheError when they do not come back."""
        lookup = look_up(self._store, list(spans_of(SEED, prompt)), max_tokens=num_history)
        if lookup.num_tokens != num_history:
            raise HCacheError(f"{self.way.name}: {lookup.num_tokens} of {num_history} tokens are saved")
        choice = self._policy.choose(lookup.records, ["memory"] * len(lookup.records))
        storage = "-" if self._policy.storage is None else self._policy.storage.summary
        again = f"recomputed {choice.recompute_tokens} tokens, {choice.recompute_layers} layers"
        self.told = f"{self.way.name}: {storage}, {again}"
        if choice.is_prefill:
            return num_history
        self._engine.reserve(uid, num_history)
        restore = self._restorer.start(
            self._engine.target(uid),
            lookup.records,
            prompt,
            recompute_tokens=choice.recompute_tokens,
            recompute_layers=choice.recompute_layers,
        )
        outcome = restore.step(WAIT_S, wait=True)
        if outcome is None or outcome.num_tokens != num_history:
            raise HCacheError(f"{self.way.name}: the restore ended as {outcome}")
        return 0

    def close(self) -> None:
        """End its threads."""
        self.saver.stop()
        self._restorer.stop()
        self._store.close()


class Contexts:
    """Sequences on one engine, one step at a time. Free blocks hold NaN: what was not brought back cannot lie there."""

    def __init__(self, engine: HCacheEngine) -> None:
        self.engine = engine
        engine.poison_free_blocks()
        self._uids = itertools.count(1)

    def new(self) -> int:
        """A sequence's name."""
        return next(self._uids)

    def run(self, uid: int, tokens: Sequence[int], *, batch_tokens: int | None = None) -> torch.Tensor:
        """Tokens in batches of at most so many. Returns the last one's logits: `[vocab]`, float32, host."""
        size = batch_tokens or self.engine.max_batch_tokens
        logits = torch.empty(0)
        for start in range(0, len(tokens), size):
            logits = self.engine.put([uid], token_tensors([tokens[start : start + size]]))
        return logits[0].float().cpu()

    def run_and_save(self, uid: int, tokens: Sequence[int], states: Sequence[Saved]) -> None:
        """The same for a new sequence, whose state every one of `states` saves."""
        savers = [state.saver for state in states]
        for saver in savers:
            saver.open(uid, seed=SEED, token_ids=[])
        self.engine.model().qkv_input_tap = SharedTap(savers)
        for start in range(0, len(tokens), self.engine.max_batch_tokens):
            batch = tokens[start : start + self.engine.max_batch_tokens]
            for saver in savers:
                if not saver.drain(WAIT_S):  # nothing is to be dropped for want of room
                    raise HCacheError(f"saved state did not reach memory within {WAIT_S:g} s")
                saver.begin_step([StepSegment(uid=uid, token_ids=batch)])
            self.engine.put([uid], token_tensors([batch]))
            for saver in savers:
                saver.end_step()
        self.engine.model().qkv_input_tap = None
        for saver in savers:
            saver.drain(WAIT_S)
            saver.close(uid)

    def choose(
        self, uid: int, first: torch.Tensor, num_tokens: int, stop: frozenset[int] = frozenset()
    ) -> tuple[list[int], torch.Tensor]:
        """The likeliest tokens behind logits `first`: `num_tokens`, or fewer when one of `stop` comes (left out). And
        the logits that each was chosen from, `[num_tokens, vocab]`."""
        chosen: list[int] = []
        rows = [first]
        while len(chosen) < num_tokens:
            token = int(rows[-1].argmax())
            if token in stop:
                break
            chosen.append(token)
            if len(chosen) < num_tokens:
                rows.append(self.run(uid, [token]))
        return chosen, torch.stack(rows)

    def follow(self, uid: int, first: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
        """Logits before each token of an answer, whatever the model would have said: `[len(answer), vocab]`."""
        return torch.stack([first, *(self.run(uid, [token]) for token in answer[:-1])])

    def restored(self, state: Saved, prompt: Sequence[int], num_history: int) -> tuple[int, torch.Tensor]:
        """A new sequence with its history from saved state and the rest of the prompt behind it: its name, and its last
        logits."""
        uid = self.new()
        num_missing = state.bring_back(uid, prompt, num_history)
        return uid, self.run(uid, prompt[num_history - num_missing :])


def whole_spans(num_tokens: int) -> int:
    """The tokens of them that can be saved."""
    return num_tokens // SPAN_TOKENS * SPAN_TOKENS
