"""A conversation in token ids: the user speaks by seed, the answers are the model's own."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from mii_hcache.core.geometry import SPAN_TOKENS

ANSWER_TOKENS = 16
"""Tokens of every answer: enough for saved state to begin and end in the middle of spans."""
MESSAGE_TOKENS = 32
"""Tokens of the last message, whose first answer token is timed."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns of a message and an answer. The last turn finds `history_tokens` tokens in the blocks of a context that
    never left, no more: the last token of an answer is generated, but not run before the next turn."""

    messages: tuple[tuple[int, ...], ...]
    answers: list[list[int]] = field(default_factory=list)
    """Of the turns so far; the reference run appends them."""

    @property
    def num_turns(self) -> int:
        """Messages, answered or not."""
        return len(self.messages)

    @property
    def history_tokens(self) -> int:
        """Tokens in the blocks before the last turn."""
        return self.num_present(self.num_turns - 1)

    def prompt(self, turn: int) -> list[int]:
        """Everything said up to and with the message of `turn`."""
        told: list[int] = []
        for idx in range(turn):
            told += self.messages[idx]
            told += self.answers[idx]
        return told + list(self.messages[turn])

    def num_present(self, turn: int) -> int:
        """Tokens in the blocks before `turn`, in a context that never left."""
        return sum(len(message) + ANSWER_TOKENS for message in self.messages[:turn]) - (turn > 0)

    def num_restorable(self, turn: int) -> int:
        """Tokens that a restore must bring back before `turn`: whole spans."""
        return self.num_present(turn) // SPAN_TOKENS * SPAN_TOKENS

    def num_tokens(self) -> int:
        """All tokens, the last answer included."""
        return self.history_tokens + 1 + len(self.messages[-1]) + ANSWER_TOKENS


def least_history_tokens(num_turns: int) -> int:
    """Shortest history that has a span to restore and a message in every turn."""
    return max(SPAN_TOKENS, (num_turns - 1) * (ANSWER_TOKENS + 1) - 1)


def make_conversation(*, history_tokens: int, num_turns: int, vocab_size: int, seed: int) -> Conversation:
    """`num_turns` (>= 2) turns, the last one after exactly `history_tokens` (>= `least_history_tokens`)."""
    chooser = random.Random(f"{seed}/{history_tokens}/{num_turns}")
    num_before = num_turns - 1
    sizes = [(history_tokens + 1) * (idx + 1) // num_before - (history_tokens + 1) * idx // num_before
             for idx in range(num_before)]  # fmt: skip
    lengths = [*(size - ANSWER_TOKENS for size in sizes), MESSAGE_TOKENS]
    first = min(3, vocab_size - 1)  # the lowest ids are mostly padding, begin and end
    return Conversation(messages=tuple(tuple(chooser.choices(range(first, vocab_size), k=num)) for num in lengths))
