"""Three ways to decode with one batch: nothing is saved, `--save two-stage`, `--save direct`.

A turn is as many steps as a span has tokens, from the same history on; the sequences of a batch begin it at different
places within their spans, so that spans become whole all through the turn, as on a server. The ways take the same steps
in stretches, one after the other: a machine that gets slower is slower for all of them.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch

from mii_hcache.config import HCacheConfig
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.plans import uniform_storage
from mii_hcache.engine.ragged_engine import HCacheEngine, token_tensors
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.state_dir import StateDir

NUM_STEPS = SPAN_TOKENS
STRETCH_STEPS = 16


class Variant(ABC):
    """What happens to the hidden states of every step. Engine thread only."""

    name: str
    """The paper's."""

    def __init__(self, engine: HCacheEngine) -> None:
        self.engine = engine

    @abstractmethod
    def begin(self, turn: int, tokens: Sequence[Sequence[int]]) -> None:
        """A turn begins: sequence `uid` has `tokens[uid]` in its blocks."""

    @abstractmethod
    def step(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """One forward. Returns logits, `[num_sequences, vocab]`."""

    def prefill(self, uid: int, tokens: Sequence[int]) -> None:
        """Bring a sequence to its place within a span; not timed."""
        self.step([uid], [tokens])

    def settle(self) -> None:  # noqa: B027
        """A stretch is over: finish what still runs behind it, before another way's is timed; not timed itself."""

    def end(self, uids: Sequence[int]) -> None:  # noqa: B027
        """The turn is over; not timed."""

    def close(self) -> None:  # noqa: B027
        """Give files and threads back."""

    @property
    def note(self) -> str:
        """What a reader must know."""
        return ""


class Unsaved(Variant):
    """Nothing is saved."""

    name = "Ideal"

    def begin(self, turn: int, tokens: Sequence[Sequence[int]]) -> None:
        pass

    def step(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        self.engine.model().qkv_input_tap = None
        return self.engine.put(uids, token_tensors(tokens))


class Saved(Variant):
    """The engine's own saver into its own files, in one of its ways."""

    def __init__(self, engine: HCacheEngine, folder: Path, num_bytes: int, save: str) -> None:
        """`num_bytes`: what all turns will save; `save`: as `--save`."""
        super().__init__(engine)
        self.name = {"two-stage": "HCache", "direct": "DirectIO"}[save]
        self._save = save
        self._counters = Counters()
        self._state_dir = StateDir(folder)
        self._store = FileStore(self._state_dir, 2 * num_bytes + (256 << 20), io=HCacheConfig().io)
        self._saver = Saver(
            adapter=engine,
            store=self._store,
            plan=uniform_storage(engine.geometry, ChunkKind.HIDDEN),
            max_batch_tokens=engine.max_batch_tokens,
            counters=self._counters,
            save=save,
        )

    def begin(self, turn: int, tokens: Sequence[Sequence[int]]) -> None:
        for uid, history in enumerate(tokens):
            self._saver.open(uid, seed=f"turn {turn}".encode(), token_ids=history)

    def step(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        segments = [StepSegment(uid=uid, token_ids=ids) for uid, ids in zip(uids, tokens, strict=True)]
        self.engine.model().qkv_input_tap = self._saver
        self._saver.begin_step(segments)
        logits = self.engine.put(uids, token_tensors(tokens))
        self._saver.end_step()
        return logits

    def settle(self) -> None:
        self._saver.drain()
        self._store.flush()

    def end(self, uids: Sequence[int]) -> None:
        for uid in uids:
            self._saver.close(uid)

    def close(self) -> None:
        self.engine.model().qkv_input_tap = None
        self._saver.stop()
        self._store.close()
        self._state_dir.close()

    @property
    def num_saved_spans(self) -> int:
        """That reached the store."""
        return int(self._counters.snapshot().get("saved_spans_total", 0))

    @property
    def note(self) -> str:
        counters = self._counters.snapshot()
        lost = sum(int(counters.get(name, 0)) for name in ("dropped_rows_total", "save_errors_total"))
        told = f"--save {self._save}: {self.num_saved_spans} spans saved by {self._store.io.name}, {lost} losses"
        if self._save == "direct":
            geometry = self.engine.geometry
            row_bytes = geometry.row_bytes(ChunkKind.HIDDEN)
            num_layers = len(geometry.saved_layers(ChunkKind.HIDDEN))
            told += (
                f", {num_layers} rows of {row_bytes} bytes a sequence and step, in whole blocks, all of a step at once"
            )
        return told


class Batch:
    """Sequences with one history length that decode together, turn after turn."""

    def __init__(self, engine: HCacheEngine, num_sequences: int, history_tokens: int) -> None:
        self.engine = engine
        self.uids = list(range(num_sequences))
        self._chance = random.Random(num_sequences)
        self._vocab = range(3, int(engine.model().vocab_size))
        self._histories = [self._chance.choices(self._vocab, k=history_tokens) for _ in self.uids]
        self._turn = 0
        engine.model().qkv_input_tap = None
        for uid, history in enumerate(self._histories):
            for start in range(0, history_tokens, engine.max_batch_tokens):
                engine.put([uid], token_tensors([history[start : start + engine.max_batch_tokens]]))

    def take_turn(self, variants: Sequence[Variant]) -> dict[str, list[float]]:
        """Mean seconds between tokens, of each stretch, by name."""
        self._turn += 1
        ahead = [self._chance.choices(self._vocab, k=uid * SPAN_TOKENS // len(self.uids)) for uid in self.uids]
        lengths = [len(history) for history in self._histories]
        for variant in variants:
            self._go_back(lengths)
            variant.begin(self._turn, self._histories)
            for uid, tokens in enumerate(ahead):
                if tokens:
                    variant.prefill(uid, tokens)
            variant.settle()
        lengths = [length + len(tokens) for length, tokens in zip(lengths, ahead, strict=True)]
        tokens, times_s = self._chance.choices(self._vocab, k=len(self.uids)), {one.name: [] for one in variants}
        for stretch in range(NUM_STEPS // STRETCH_STEPS):
            first = (self._turn + stretch) % len(variants)
            for variant in (*variants[first:], *variants[:first]):
                self._go_back(lengths)
                took_s, chosen = self._decode(variant, tokens)
                times_s[variant.name].append(took_s / STRETCH_STEPS)
                variant.settle()
            tokens, lengths = chosen, [length + STRETCH_STEPS for length in lengths]
        for variant in variants:
            variant.end(self.uids)
        return times_s

    def _decode(self, variant: Variant, tokens: list[int]) -> tuple[float, list[int]]:
        """A stretch that begins with these tokens: its seconds, and the tokens that the next one begins with."""
        started_s = time.perf_counter()
        for _ in range(STRETCH_STEPS):
            logits = variant.step(self.uids, [[token] for token in tokens])
            tokens = logits.argmax(-1).tolist()  # waits for the device, as choosing tokens does
        return time.perf_counter() - started_s, tokens

    def _go_back(self, lengths: Sequence[int]) -> None:
        for uid, length in enumerate(lengths):
            self.engine.truncate(uid, length)

    def close(self) -> None:
        """Free the blocks."""
        for uid in self.uids:
            self.engine.evict(uid)
