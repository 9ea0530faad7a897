"""A model's tokenizer: text to token ids and back, its chat template, the tokens that end an answer."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mii_hcache.errors import ConfigError, RequestError

_ANCHORS = ("\n", "|", "0")
"""Texts that fragments are tokenised behind, see `Tokenizer.encode_continuation`."""


class Tokenizer:
    """The Hugging Face tokenizer of a local folder or hub id. Every method may be called from any thread.

    Raises ConfigError when the tokenizer cannot be loaded. Code that comes with a model is never run.
    """

    def __init__(self, model: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            hf: Any = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"cannot load the tokenizer of {str(model)!r}: {error}") from error
        self._hf = hf
        self._backend: Any = getattr(hf, "backend_tokenizer", None)
        self._lock = threading.Lock()
        """For tokenizers in Python: they keep state in themselves."""
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self.eos_token_id: int | None = hf.eos_token_id
        self.bos_token_id: int | None = hf.bos_token_id
        self.vocab_size: int = len(hf)
        """Ids that the tokenizer knows; a model's embedding is often padded beyond it."""
        self.stop_token_ids: frozenset[int] = frozenset(_stop_token_ids(hf, str(model)))
        """Tokens that end an answer: the tokenizer's EOS and those of the model's generation_config."""
        self._prefixes_fragments = self.encode("0", add_special_tokens=False) != self._behind_anchor("0")

    def fingerprint(self) -> bytes:
        """16 bytes that differ between tokenizers that may give a text different ids. Takes up to a second."""
        if self._backend is not None:
            content = self._backend.to_str()
        else:
            content = f"{type(self._hf).__name__} {sorted(self._hf.get_vocab().items())}"
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return bool(self._hf.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a whole text. `add_special_tokens`: what the tokenizer puts around a text by default (BOS);
        not for a rendered chat, whose template writes BOS as text where the model wants it.

        Releases the interpreter while it works, where the tokenizer is not plain Python.
        """
        if self._backend is not None:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        with self._lock:
            return list(self._hf.encode(text, add_special_tokens=add_special_tokens))

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that stands behind other text. Differs from `encode` for tokenizers that put a space
        before every text (SentencePiece models such as Llama 2), which is wrong in the middle of one."""
        if not self._prefixes_fragments or not text:
            return self.encode(text, add_special_tokens=False)
        return self._behind_anchor(text)

    def _behind_anchor(self, text: str) -> list[int]:
        for anchor in _ANCHORS:
            anchor_ids = self.encode(anchor, add_special_tokens=False)
            ids = self.encode(anchor + text, add_special_tokens=False)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; bytes that are not UTF-8 become U+FFFD. Ids that the tokenizer
        does not know have no text."""
        if self._backend is not None:
            text: str = self._backend.decode(token_ids, skip_special_tokens=True)
            return text
        with self._lock:
            return str(self._hf.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The text that the model's chat template makes of messages (`role`, `content`).

        Raises RequestError when there is no template or the template refuses the messages (many want turns that
        alternate).
        """
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template; send the text to /v1/completions instead",
                param="messages",
                code="no_chat_template",
            )
        try:
            return str(
                self._hf.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages", code="invalid_messages"
            ) from error


def _stop_token_ids(hf: Any, model: str) -> set[int]:
    from transformers import GenerationConfig

    stop: set[int] = set() if hf.eos_token_id is None else {hf.eos_token_id}
    try:
        generation = GenerationConfig.from_pretrained(model)
    except OSError:  # models without the file
        return stop
    eos = generation.eos_token_id
    if isinstance(eos, int):
        stop.add(eos)
    elif eos is not None:
        stop.update(int(token_id) for token_id in eos)
    return stop
