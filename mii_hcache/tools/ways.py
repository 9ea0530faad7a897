"""One conversation, continued in every way there is: each way's agreement with the reference, and its first token's
time.

The reference is a context that never leaves (`resident`). Every other way finds the same tokens and must give the same
answers. All are timed alike: from having the prompt's token ids to having the first answer token, nothing else running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.tools.budget import REPEATS, Round
from mii_hcache.tools.conversation import ANSWER_TOKENS, make_conversation
from mii_hcache.tools.limits import SPLITS, Agreement, Limits, noise_of
from mii_hcache.tools.report import Row
from mii_hcache.tools.saved_state import Brought, SavedState
from mii_hcache.tools.session import Session, Turn

SEED = 20250330


class Ways:
    """All ways of one conversation on one engine. Use once: `rows`."""

    def __init__(
        self, session: Session, planned: Round, *, num_turns: int, seed: int, tell: Callable[[str], None]
    ) -> None:
        self._session = session
        self._num_repeats = planned.num_repeats
        self._tell_progress = tell
        self._talk = make_conversation(
            history_tokens=planned.history_tokens,
            num_turns=num_turns,
            vocab_size=session.engine.model().vocab_size,
            seed=seed,
        )
        self._last = num_turns - 1
        self._reference: list[torch.Tensor] = []
        self._controls: list[Turn] = []
        """Timed runs of recompute; one more after every other way, so that a busy moment shows."""

    def rows(self, kinds: Sequence[ChunkKind], cold_kind: ChunkKind | None, directory: Path) -> list[Row]:
        """A row for each way. `cold_kind` is what the cold way saves, None leaves that way out; `directory` takes the
        state, one folder a kind."""
        resident = self._resident()
        recomputed = self._recompute()
        limits = self._limits(recomputed)
        others = [] if cold_kind is None else [self._cold(cold_kind, directory / f"cold-{cold_kind.value}", limits)]
        for kind in kinds:
            others += self._restored(kind, directory / kind.value, limits)
        return [resident, self._judge("recompute", recomputed, self._controls, limits), *others]

    # --- without saved state --------------------------------------------------------------------------------------

    def _resident(self) -> Row:
        """Plays the conversation: from here on the answers and the reference are known."""
        talk, session = self._talk, self._session
        uid = None
        for turn in range(talk.num_turns):
            self._tell(f"a context that stays, turn {turn + 1}")
            played = session.go_on(uid, talk.prompt(turn)[talk.num_present(turn) :])
            uid = played.uid
            talk.answers.append(played.token_ids)
            self._reference.append(played.logits)
        assert uid is not None
        times_s = []
        for _ in range(self._num_repeats):
            session.engine.truncate(uid, talk.history_tokens)
            times_s.append(session.go_on(uid, talk.prompt(self._last)[talk.history_tokens :], num_answer=1).ttft_s)
        session.evict(uid)
        return Row(
            history_tokens=talk.history_tokens,
            way="resident",
            reused_tokens=talk.history_tokens,
            times_s=times_s,
        )

    def _recompute(self) -> Agreement:
        agreement = Agreement()
        for turn in range(1, self._talk.num_turns):
            self._tell(f"recompute, turn {turn + 1}")
            taken = self._take(turn, "recompute")
            agreement.add(taken.logits, self._reference[turn])
            self._session.evict(taken.uid)
        for _ in range(self._num_repeats):
            self._control()
        return agreement

    def _control(self) -> None:
        self._controls.append(self._first_token("recompute"))

    def _cold(self, kind: ChunkKind, directory: Path, limits: Limits) -> Row:
        """Nothing is saved yet, all is prefilled and saved: what saving costs the first token."""
        way = f"cold/{kind.value}"
        agreement = Agreement()
        with self._saved_state(kind, directory, is_patient=False) as state:
            turns = []
            for idx in range(min(REPEATS, self._num_repeats) + 1):  # each one writes the whole history
                state.start_over(f"cold {idx}")
                self._tell(f"{way}, run {idx + 1}")
                taken = self._take(self._last, way, state=state, save=True)
                state.leave(taken.uid)
                self._session.evict(taken.uid)
                agreement.add(taken.logits, self._reference[self._last])
                turns.append(taken)
        self._control()
        return self._judge(way, agreement, turns[1:], limits)  # the first one made the buffers

    def _limits(self, recomputed: Agreement) -> Limits:
        """Bounds; in 16 bit measured."""
        session = self._session
        scale = max(float(rows.abs().max()) for rows in self._reference)
        dtype = session.engine.dtype
        noise = None
        if dtype is not torch.float32:
            runs = [self._reference[self._last]]
            for batch_tokens in SPLITS:
                self._tell(f"the engine's own noise, batches of {batch_tokens}")
                taken = self._take(self._last, "noise", batch_tokens=batch_tokens)
                runs.append(taken.logits)
                session.evict(taken.uid)
            noise = max(recomputed.max_logit_difference, noise_of(runs))
        return Limits(dtype=dtype, scale=scale, noise=noise)

    # --- restored ---------------------------------------------------------------------------------------------------

    def _restored(self, kind: ChunkKind, directory: Path, limits: Limits) -> list[Row]:
        """Every turn restored from memory what the turns before saved, then the last one from files after a restart."""
        memory, file = f"{kind.value}/memory", f"{kind.value}/file"
        with self._saved_state(kind, directory) as state:
            agreement, problems, original = self._play_evicted(state, memory)
            turns = [self._first_token(memory, state) for _ in range(self._num_repeats)]
        from_memory = self._judge(memory, agreement, turns, limits, kind, problems)
        self._control()
        with self._saved_state(kind, directory, in_memory=False) as state:
            self._tell(f"{file}, turn {self._last + 1}")
            state.drop_page_cache()
            agreement = Agreement()
            taken = self._take(self._last, file, state=state)
            problems = self._compare(agreement, taken, self._last, original, kind, file)
            self._session.evict(taken.uid, original)
            turns = []
            for _ in range(self._num_repeats):
                state.drop_page_cache()
                turns.append(self._first_token(file, state))
        self._control()
        return [from_memory, self._judge(file, agreement, turns, limits, kind, problems)]

    def _play_evicted(self, state: SavedState, way: str) -> tuple[Agreement, list[str], int]:
        """All turns, evicted after each. Returns the one whose blocks the last turn must find again, still live."""
        agreement, problems = Agreement(), []
        original: int | None = None
        for turn in range(self._talk.num_turns):
            self._tell(f"{way}, turn {turn + 1}")
            taken = self._take(turn, way, state=state, save=True)
            state.leave(taken.uid)
            if original is not None:
                problems += self._compare(agreement, taken, turn, original, state.kind, way)
            if turn < self._last:
                self._session.evict(original)
                original = taken.uid
        self._session.evict(taken.uid)
        assert original is not None
        return agreement, problems, original

    def _compare(
        self, agreement: Agreement, taken: Turn, turn: int, original: int, kind: ChunkKind, way: str
    ) -> list[str]:
        """A restored turn with the reference, and its K and V with those of the sequence that they were saved from."""
        agreement.add(taken.logits, self._reference[turn])
        if taken.brought.num_tokens:
            agreement.add_kv(self._session.kv_difference(taken.uid, original, taken.brought.num_tokens))
        return _shortfall(taken.brought, self._talk.num_restorable(turn), kind.value, way.split("/")[1])

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _take(
        self,
        turn: int,
        way: str,
        *,
        state: SavedState | None = None,
        save: bool = False,
        num_answer: int = ANSWER_TOKENS,
        batch_tokens: int | None = None,
    ) -> Turn:
        return self._session.take_turn(
            self._talk.prompt(turn),
            self._talk.answers[turn][:num_answer],
            way=way,
            state=state,
            num_history=self._talk.num_present(turn),
            save=save,
            batch_tokens=batch_tokens,
        )

    def _tell(self, text: str) -> None:
        self._tell_progress(f"history {self._talk.history_tokens}: {text}")

    def _first_token(self, way: str, state: SavedState | None = None) -> Turn:
        """The last turn up to its first token, to be timed; nothing is saved."""
        self._tell(f"{way}, timed runs")
        taken = self._take(self._last, way, state=state, num_answer=1)
        self._session.evict(taken.uid)
        return taken

    def _saved_state(
        self, kind: ChunkKind, directory: Path, *, in_memory: bool = True, is_patient: bool = True
    ) -> SavedState:
        return SavedState(
            self._session.engine,
            directory,
            kind=kind,
            max_tokens=self._talk.num_tokens(),
            in_memory=in_memory,
            is_patient=is_patient,
        )

    def _judge(
        self,
        way: str,
        agreement: Agreement,
        turns: Sequence[Turn],
        limits: Limits,
        kind: ChunkKind | None = None,
        problems: Sequence[str] = (),
    ) -> Row:
        return Row(
            history_tokens=self._talk.history_tokens,
            way=way,
            reused_tokens=min(turn.brought.num_tokens for turn in turns),
            times_s=[turn.ttft_s for turn in turns],
            read_bytes=max(turn.brought.read_bytes for turn in turns),
            num_tokens=agreement.num_tokens,
            num_equal=agreement.num_equal,
            max_logit_difference=agreement.max_logit_difference,
            logit_bound=limits.logits,
            max_kv_difference=agreement.max_kv_difference,
            kv_bound=None if kind is None else limits.kv(kind),
            problems=[*problems, *agreement.complaints(limits, kind)],
        )


def _shortfall(brought: Brought, num_wanted: int, kind: str, tier: str) -> list[str]:
    """What is wrong with what came back: too little, of another kind, from elsewhere."""
    if brought.num_tokens != num_wanted:
        why = f" ({brought.why_short})" if brought.why_short else ""
        return [f"{brought.num_tokens} of {num_wanted} tokens were restored{why}"]
    if num_wanted and (brought.kinds != (kind,) or brought.tiers != (tier,)):
        return [f"restored {'+'.join(brought.kinds)} from {'+'.join(brought.tiers)}, not {kind} from {tier}"]
    return []
