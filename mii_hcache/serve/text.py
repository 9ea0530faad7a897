"""How a prompt's text becomes token ids: the ids that were generated for as much of it as is known, the tokenizer's for
the rest.

Saved state hangs on token ids, and text does not re-tokenise to the ids that were generated. So at the end of an answer
its rendered text is remembered with its ids, per tenant, and a prompt takes the ids of its longest remembered
beginning. What a client re-sends is the key; it needs no id and no support for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mii_hcache.engine.tokenizer import Tokenizer
from mii_hcache.errors import RequestError
from mii_hcache.serve.answer import AnswerText

TEXT_CHANGED = "text_changed"
"""`miss_reason` of a chat whose last assistant message does not end like an answer that was given."""

_PROBE = "mii0hcache0probe0e7f3a1"
"""Stands in for a message's content to learn what the chat template puts around it."""
_CHAT, _PLAIN = "chat\n", "text\n"
"""A rendered chat and a plain text are different keys: the latter has BOS put before it."""

Message = Mapping[str, str]


class KnownTexts(Protocol):
    """Rendered texts and their token ids, per tenant (`storage.transcripts.Transcripts`). Thread-safe."""

    def remember(self, tenant: bytes, text: str, token_ids: Sequence[int]) -> None: ...

    def longest_prefix(self, tenant: bytes, text: str) -> tuple[int, list[int]] | None:
        """Characters covered, and their ids."""
        ...

    def flush(self) -> None:
        """Return when everything remembered is durable."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the engine takes it, and what is needed to remember the answer to it."""

    token_ids: Sequence[int]
    text: str | None = None
    """None: the prompt came as token ids, there is no text to remember."""
    messages: tuple[Message, ...] | None = None
    """Of a chat."""
    tenant: bytes = field(default=b"", repr=False)
    miss_hint: str | None = None


class PromptEncoder:
    """Prompts in, answers remembered. Any thread but the event loop's: long texts take a while, storage may block."""

    def __init__(self, tokenizer: Tokenizer, known_texts: KnownTexts) -> None:
        self._tokenizer = tokenizer
        self._known = known_texts
        self._vocabulary = tokenizer.fingerprint()
        """Goes before the tenant: a state directory may serve another model later, whose ids mean other things."""

    def encode_chat(self, messages: Sequence[Message], *, tenant: bytes = b"") -> EncodedPrompt:
        """Raises RequestError when the model has no chat template or it refuses the messages."""
        text = self._tokenizer.render_chat(messages, add_generation_prompt=True)
        num_known, token_ids = self._encode(_CHAT, text, tenant, add_special_tokens=False)
        return EncodedPrompt(
            token_ids=token_ids,
            text=text,
            messages=tuple(messages),
            tenant=tenant,
            miss_hint=TEXT_CHANGED if num_known < self._end_of_last_answer(messages, text) else None,
        )

    def encode_text(self, text: str, *, tenant: bytes = b"") -> EncodedPrompt:
        """A plain text, with the special tokens that the tokenizer puts around one."""
        _, token_ids = self._encode(_PLAIN, text, tenant, add_special_tokens=True)
        return EncodedPrompt(token_ids=token_ids, text=text, tenant=tenant)

    def take_ids(self, token_ids: Sequence[int], *, tenant: bytes = b"") -> EncodedPrompt:
        """Token ids, as they are."""
        return EncodedPrompt(token_ids=token_ids, tenant=tenant)

    def remember(self, prompt: EncodedPrompt, answer: AnswerText, generated_ids: Sequence[int]) -> None:
        """Make the prompt and its answer known, as the client saw them and as the chat template will render them when
        they are sent again. An answer without text is not: the prompt alone must keep meaning the prompt alone.

        Durable on return: a client that has seen the end of an answer can go on with the same tokens, whatever becomes
        of this process.

        `generated_ids`: what `answer` was made of, perhaps with more behind it (a stop token, which the template writes
        as text, or what came after a stop string).
        """
        if prompt.text is None or not answer.text:
            return
        num_tokens, rest = answer.tokens_of_text()
        token_ids = [*prompt.token_ids, *generated_ids[:num_tokens]]
        if rest:
            token_ids += self._tokenizer.encode_continuation(rest)
        self._remember_texts(prompt, answer, token_ids)
        self._known.flush()

    def _remember_texts(self, prompt: EncodedPrompt, answer: AnswerText, token_ids: Sequence[int]) -> None:
        assert prompt.text is not None
        said = prompt.text + answer.text
        if prompt.messages is None:
            self._known.remember(self._vocabulary + prompt.tenant, _PLAIN + said, token_ids)
            return
        self._known.remember(self._vocabulary + prompt.tenant, _CHAT + said, token_ids)
        rendered = self._rendered_next_turn(prompt.messages, prompt.text, answer.text)
        if rendered is not None and rendered != said:
            self._known.remember(self._vocabulary + prompt.tenant, _CHAT + rendered, token_ids)

    def _encode(self, kind: str, text: str, tenant: bytes, *, add_special_tokens: bool) -> tuple[int, list[int]]:
        """Characters whose ids were known, and the ids of all."""
        known = self._known.longest_prefix(self._vocabulary + tenant, kind + text)
        if known is None or known[0] <= len(kind):
            return 0, self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        num_chars, token_ids = known[0] - len(kind), known[1]
        return num_chars, token_ids + self._tokenizer.encode_continuation(text[num_chars:])

    def _end_of_last_answer(self, messages: Sequence[Message], text: str) -> int:
        """Where the last assistant message ends in the rendered text; 0 when there is none or it cannot be told."""
        for idx in reversed(range(len(messages))):
            if messages[idx]["role"] == "assistant":
                bounds = self._content_bounds(messages, idx, text, add_generation_prompt=True)
                return 0 if bounds is None else bounds[1]
        return 0

    def _rendered_next_turn(self, messages: Sequence[Message], prompt_text: str, answer: str) -> str | None:
        """The next turn's rendered text up to the end of the answer, which a template may strip of white space and put
        white space before. None when it does more than that: then the ordinary tokens decide."""
        turns = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "?"}]
        try:
            text = self._tokenizer.render_chat(turns, add_generation_prompt=False)
            bounds = self._content_bounds(turns, len(messages), text, add_generation_prompt=False)
        except RequestError:  # a template that wants turns in some other order
            return None
        if bounds is None:
            return None
        start, stop = bounds
        same_answer = text[start:stop].strip() == answer.strip() != ""
        same_prompt = text[:start].rstrip() == prompt_text.rstrip()
        return text[:stop] if same_answer and same_prompt else None

    def _content_bounds(
        self, messages: Sequence[Message], idx: int, text: str, *, add_generation_prompt: bool
    ) -> tuple[int, int] | None:
        """Where the content of message `idx` lies in `text`, the rendering of `messages`."""
        probe = [*messages[:idx], {**messages[idx], "content": _PROBE}, *messages[idx + 1 :]]
        head, found, tail = self._tokenizer.render_chat(probe, add_generation_prompt=add_generation_prompt).partition(
            _PROBE
        )
        stop = len(text) - len(tail)
        if not found or _PROBE in tail or stop < len(head) or not (text.startswith(head) and text.endswith(tail)):
            return None
        return len(head), stop
