"""How likely tokens were, in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mii_hcache.runtime.generation import TokenLogprob
from mii_hcache.serve.answer import Decode, Detokenizer
from mii_hcache.serve.token_names import TokenNames

_LOWEST = -9999.0
"""What OpenAI writes for a token that could not be; JSON has no minus infinity."""

LogprobsJson = Callable[[Sequence["Scored"]], dict[str, Any]]


class Scored(NamedTuple):
    """A token of a prompt or an answer with its logprob."""

    token_id: int
    offset: int
    """Characters before it: in the prompt, or in the prompt and the answer. Tokens that make one character together
    have the same."""
    logprob: TokenLogprob | None
    """None for the first token of a prompt."""


def offsets_of(decode: Decode, token_ids: Iterable[int]) -> list[int]:
    """Characters before each token in the text of all."""
    detokenizer, num_chars, offsets = Detokenizer(decode), 0, []
    for token_id in token_ids:
        offsets.append(num_chars)
        num_chars += len(detokenizer.push(token_id))
    return offsets


def completion_logprobs(names: TokenNames, num_top: int) -> LogprobsJson:
    """`logprobs` of a choice of /v1/completions: a list for each property, a place for each token."""

    def top_of(told: TokenLogprob | None) -> dict[str, float] | None:
        if told is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in told.top[:num_top]:
            top.setdefault(names.of_completion(token_id), _finite(logprob))  # best first: of two names, the better
        return top

    def to_json(scored: Sequence[Scored]) -> dict[str, Any]:
        return {
            "tokens": [names.of_completion(token.token_id) for token in scored],
            "token_logprobs": [None if token.logprob is None else _finite(token.logprob.logprob) for token in scored],
            "top_logprobs": [top_of(token.logprob) for token in scored] if num_top else None,
            "text_offset": [token.offset for token in scored],
        }

    return to_json


def chat_logprobs(names: TokenNames, num_top: int) -> LogprobsJson:
    """`logprobs` of a choice of /v1/chat/completions: an object for each token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = names.bytes_of(token_id)
        return {"token": names.of_chat(token_id), "logprob": _finite(logprob), "bytes": list(raw)}

    def to_json(scored: Sequence[Scored]) -> dict[str, Any]:
        content = []
        for token in scored:
            assert token.logprob is not None, "a chat answer does not start with its prompt"
            top = [entry(token_id, logprob) for token_id, logprob in token.logprob.top[:num_top]]
            content.append(entry(token.token_id, token.logprob.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    return to_json


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # so for NaN too
