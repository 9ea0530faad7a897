"""Generated tokens become the text of an answer: piece by piece, cut at the first stop string.

The text of an answer is by definition the concatenation of its pieces. Streamed or not, it is the same, and it is what
is remembered beside the token ids.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Text of token ids on their own, U+FFFD where bytes are not UTF-8."""

CONTEXT_TOKENS = 6
"""Prompt tokens worth giving to a detokenizer."""

_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 8
"""A character is at most four bytes, hence four tokens; a longer run is not UTF-8 and need not wait to its end."""


class Detokenizer:
    """Text of a growing token sequence, each piece as soon as it is certain. One thread at a time.

    Only a few tokens are decoded at each step: those whose text is out but may matter to what follows (a leading space
    is dropped at the start of a text only), and those that wait because their last character is incomplete.

        tokens   ... | context | pending |
        text       out   out      waits
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        """`context`: the last tokens of the prompt. Ignored when its text ends within a character."""
        self._decode = decode
        self._context = list(context)
        self._context_text = decode(self._context)
        if self._context_text.endswith(_REPLACEMENT):
            self._context, self._context_text = [], ""
        self._pending: list[int] = []

    @property
    def num_pending(self) -> int:
        """Latest tokens whose text is not out yet."""
        return len(self._pending)

    def push(self, token_id: int) -> str:
        """The text that is certain now, often that of this token, sometimes none."""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if not text.endswith(_REPLACEMENT):
            if text == self._context_text and len(self._pending) == 1:
                self._pending.clear()  # a token without text; the context stays, for the sake of what follows it
                return ""
            return self._release(text, num_tokens=len(self._pending))
        if len(self._pending) > _MAX_PENDING_TOKENS:
            return self._release_settled(text)
        return ""

    def flush(self) -> str:
        """What waits, as it is: an incomplete character becomes U+FFFD."""
        if not self._pending:
            return ""
        return self._release(self._decode(self._context + self._pending), num_tokens=len(self._pending))

    def _release_settled(self, text: str) -> str:
        """All of a run that is not UTF-8, except the last tokens where a character may have begun."""
        for num_kept in range(1, len(self._pending)):
            tokens = self._context + self._pending
            before, kept = self._decode(tokens[:-num_kept]), self._decode(tokens[-num_kept:])
            if kept and before + kept == text:
                return self._release(before, num_tokens=len(self._pending) - num_kept)
        return ""

    def _release(self, text: str, *, num_tokens: int) -> str:
        released, self._pending = self._pending[:num_tokens], self._pending[num_tokens:]
        alone = self._decode(released)
        # Not so for decoders that look back, such as byte fallback over a run of bytes that turns out not to be UTF-8.
        follows = text.startswith(self._context_text)
        piece = text[len(self._context_text) :] if follows else alone
        self._context, self._context_text = released, alone
        return piece


class StopMatcher:
    """Cuts a growing text before the first stop string that is completed in it (of those completed by the same
    character, the longest). How the text is cut into pieces makes no difference. Aho and Corasick's automaton: one step
    per character, however many stop strings there are.

    Text that may turn out to be the start of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty. Takes time and memory linear in their total length."""
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        """Per state: length of the text's longest tail that starts a stop string; what is held back."""
        self._match = [0]
        """Per state: length of the longest stop string that ends here; 0: none."""
        for stop in stops:
            self._add(stop)
        self._fall = [0] * len(self._next)
        self._link()
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be shown, and whether a stop string is complete; then nothing may be pushed any more."""
        if len(self._next) == 1:
            return text, False
        seen = self._held + text
        for idx in range(len(self._held), len(seen)):
            self._state = self._step(self._state, seen[idx])
            if self._match[self._state]:
                self._held = ""
                return seen[: idx + 1 - self._match[self._state]], True
        shown = len(seen) - self._depth[self._state]
        self._held = seen[shown:]
        return seen[:shown], False

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, stop: str) -> None:
        if not stop:
            raise ValueError("a stop string must not be empty")
        state = 0
        for char in stop:
            child = self._next[state].get(char)
            if child is None:
                child = len(self._next)
                self._next[state][char] = child
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
            state = child
        self._match[state] = len(stop)

    def _link(self) -> None:
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for char, child in self._next[state].items():
                self._fall[child] = self._step(self._fall[state], char)
                self._match[child] = self._match[child] or self._match[self._fall[child]]
                waiting.append(child)

    def _step(self, state: int, char: str) -> int:
        while True:
            child = self._next[state].get(char)
            if child is not None:
                return child
            if state == 0:
                return 0
            state = self._fall[state]


class AnswerText:
    """The visible text of one answer while its tokens arrive. Lives on the engine thread until the answer ends."""

    def __init__(self, decode: Decode, *, context: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(decode, context)
        self._matcher = StopMatcher(stops)
        self._pieces: list[str] = []
        self._num_shown = 0
        """Characters in `_pieces`."""
        self.num_chars = 0
        """Decoded so far, shown or not: where the text of the next token will start."""
        self._cuts: list[tuple[int, int]] = [(0, 0)]
        """(chars, tokens) where text and tokens end together, in order."""
        self._num_tokens = 0
        self.stopped = False
        """A stop string is complete; tokens that come after are ignored."""

    @property
    def text(self) -> str:
        """What has been shown."""
        return "".join(self._pieces)

    @property
    def num_shown_tokens(self) -> int:
        """How many of the pushed tokens a reader has seen, wholly or in part. Those without text are seen with what
        is before them."""
        idx = bisect_right(self._cuts, (self._num_shown, self._num_tokens))
        chars, num_tokens = self._cuts[idx - 1]
        return num_tokens if chars == self._num_shown else self._cuts[idx][1]

    def push(self, token_id: int) -> str:
        """The next piece to show, possibly empty. Not for stop tokens."""
        if self.stopped:
            return ""
        self._num_tokens += 1
        return self._show(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The last piece: what was held back."""
        if self.stopped:
            return ""
        piece = self._show(self._detokenizer.flush())
        return piece if self.stopped else piece + self._keep(self._matcher.flush())

    def cut(self, num_chars: int) -> None:
        """Make the text shorter, as if the answer had been stopped there: a client that left saw no more of it."""
        self._pieces = [self.text[:num_chars]]
        self._num_shown = len(self._pieces[0])
        self.stopped = True

    def tokens_of_text(self) -> tuple[int, str]:
        """How many of the pushed tokens are the shown text, or the start of it, and the rest of the text (the part
        of a token before a stop string that starts within it)."""
        text = self.text
        chars, num_tokens = self._cuts[bisect_right(self._cuts, (len(text), self._num_tokens)) - 1]
        return num_tokens, text[chars:]

    def _show(self, text: str) -> str:
        self.num_chars += len(text)
        num_settled = self._num_tokens - self._detokenizer.num_pending
        if num_settled > self._cuts[-1][1]:
            self._cuts.append((self.num_chars, num_settled))
        shown, self.stopped = self._matcher.push(text)
        return self._keep(shown)

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
            self._num_shown += len(piece)
        return piece
