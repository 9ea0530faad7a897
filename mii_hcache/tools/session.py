"""An engine as the self-check uses it: sequences one at a time, logits of every answer token, freed blocks poisoned."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mii_hcache.core.geometry import DTYPE_BYTES
from mii_hcache.engine.ragged_engine import HCacheEngine, token_tensors
from mii_hcache.runtime.saver import StepSegment
from mii_hcache.tools.conversation import ANSWER_TOKENS
from mii_hcache.tools.injection import Injection
from mii_hcache.tools.saved_state import Brought, SavedState

_NOTHING = Brought()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """How a turn went."""

    uid: int
    """Of the sequence, which is still live."""
    logits: torch.Tensor
    """`[num_answer, vocab_size]`, float32, host: before each answer token."""
    token_ids: list[int]
    """Likeliest token of each row."""
    ttft_s: float
    """From the prompt's token ids to the first answer token."""
    brought: Brought


class Session:
    """Turns on one engine. Freed blocks are filled with NaN: a restore that leaves something out cannot find the right
    values still lying there."""

    def __init__(self, engine: HCacheEngine, injection: Injection | None = None) -> None:
        self.engine = engine
        self._injection = injection
        self._uids = itertools.count(1)
        engine.allocator.on_free = self._poison
        self._poison(list(range(engine.num_blocks)))

    @property
    def is_exact(self) -> bool:
        """Whether the model runs in float32."""
        return DTYPE_BYTES[self.engine.geometry.dtype] == 4

    @property
    def max_context_tokens(self) -> int:
        """Most tokens of one sequence."""
        return int(self.engine._config.state_manager.max_context)

    def pace(self) -> tuple[float, float]:
        """Seconds of one prefilled token and of one decode step, about; warms up on the way."""
        num_tokens = min(128, self.max_context_tokens // 2)
        prompt = [token_id % self.engine.model().vocab_size for token_id in range(num_tokens)]
        token_s, step_s = [], []
        for _ in range(3):
            started_s = time.perf_counter()
            turn = self.go_on(None, prompt, num_answer=4)
            step_s.append((time.perf_counter() - started_s - turn.ttft_s) / 3)
            token_s.append(turn.ttft_s / num_tokens)
            self.evict(turn.uid)
        return min(token_s), min(step_s)

    def take_turn(
        self,
        prompt: Sequence[int],
        answer: Sequence[int],
        *,
        way: str,
        state: SavedState | None = None,
        num_history: int = 0,
        save: bool = False,
        batch_tokens: int | None = None,
    ) -> Turn:
        """A prompt in a sequence of its own: restore up to `num_history` tokens from `state`, prefill the rest in
        batches of `batch_tokens`, then run `answer` whatever the model would have said. `save` into `state`."""
        uid = next(self._uids)
        started_s = time.perf_counter()
        brought = state.bring_back(uid, prompt, num_history) if state is not None and num_history else _NOTHING
        if self._injection is not None and brought.num_tokens:
            self._injection.spoil_blocks(way, self.engine, uid, brought.num_tokens)
        saved_into = state if save else None
        if saved_into is not None:
            saved_into.open(uid, prompt[: brought.num_tokens])
        first = self._run(uid, prompt[brought.num_tokens :], saved_into, batch_tokens)
        int(first.argmax())
        ttft_s = time.perf_counter() - started_s
        logits = [first]
        for token_id in answer[:-1]:
            logits.append(self._run(uid, [token_id], saved_into))
        turn = self._turn(uid, logits, ttft_s, brought)
        if self._injection is not None and brought.num_tokens:
            self._injection.spoil_logits(way, turn.logits)
        return turn

    def go_on(self, uid: int | None, token_ids: Sequence[int], num_answer: int = ANSWER_TOKENS) -> Turn:
        """More tokens for a sequence that is live (None: a new one), then an answer of the model's own choice."""
        uid = next(self._uids) if uid is None else uid
        started_s = time.perf_counter()
        logits = [self._run(uid, token_ids)]
        likeliest = int(logits[0].argmax())
        ttft_s = time.perf_counter() - started_s
        for _ in range(num_answer - 1):
            logits.append(self._run(uid, [likeliest]))
            likeliest = int(logits[-1].argmax())
        return self._turn(uid, logits, ttft_s)

    def evict(self, *uids: int | None) -> None:
        """Free sequences' blocks."""
        for uid in uids:
            if uid is not None:
                self.engine.evict(uid)

    def kv_difference(self, uid: int, other_uid: int, num_tokens: int) -> float:
        """Largest difference between two sequences' K and V of tokens `[0, num_tokens)`, relative to the largest value
        of the layer. Infinite where something is not a number."""
        geometry = self.engine.geometry
        worst = 0.0
        shape = (num_tokens, 2, geometry.num_kv_heads, geometry.head_size)
        mine, its = (torch.empty(shape, dtype=self.engine.dtype) for _ in range(2))
        for layer_idx in range(geometry.num_layers):
            self.engine.target(uid).read_kv(layer_idx, 0, mine)
            self.engine.target(other_uid).read_kv(layer_idx, 0, its)
            if self.engine.device.type == "cuda":
                torch.cuda.synchronize()
            worst = max(worst, relative_difference(mine, its))
        return worst

    def _run(
        self, uid: int, token_ids: Sequence[int], state: SavedState | None = None, batch_tokens: int | None = None
    ) -> torch.Tensor:
        """Tokens through the model; logits `[vocab_size]` of the last one, float32, host."""
        size = batch_tokens or self.engine.max_batch_tokens
        self.engine.model().qkv_input_tap = state.saver if state is not None else None
        logits = torch.empty(0)
        for start in range(0, len(token_ids), size):
            batch = list(token_ids[start : start + size])
            if state is not None:
                if state.is_patient:
                    state.drain()
                state.saver.begin_step([StepSegment(uid=uid, token_ids=batch)])
            logits = self.engine.put([uid], token_tensors([batch]))
            if state is not None:
                state.saver.end_step()
        return logits[0].float().cpu()

    def _turn(self, uid: int, logits: list[torch.Tensor], ttft_s: float, brought: Brought = _NOTHING) -> Turn:
        rows = torch.stack(logits)
        return Turn(uid=uid, logits=rows, token_ids=rows.argmax(-1).tolist(), ttft_s=ttft_s, brought=brought)

    @torch.inference_mode()
    def _poison(self, blocks: list[int]) -> None:
        for layer_idx in range(self.engine.geometry.num_layers):
            cache = self.engine.kv_cache(layer_idx)
            cache[torch.tensor(blocks, device=cache.device)] = float("nan")


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `reference`; infinite unless all is finite."""
    scale = float(reference.abs().max())
    difference = float((ours.float() - reference.float()).abs().max())
    if not (difference < float("inf") and 0 < scale < float("inf")):
        return 0.0 if torch.equal(ours, reference) else float("inf")
    return difference / scale
