"""What a single token is called where tokens are listed one by one (`logprobs`)."""

from __future__ import annotations

import re

from mii_hcache.engine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
"""SentencePiece's name of a token that is one byte."""


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's way to write bytes as characters: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + idx): byte for idx, byte in enumerate(others)}


_BYTES_BY_CHAR = _byte_alphabet()


class TokenNames:
    """Strings and bytes of single tokens, each as it is within a text. Any thread; what was asked once is remembered.

    A token may be part of a character: then its string says its bytes, in OpenAI's two ways.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("0", add_special_tokens=False)[-1:]
        """Decoded before each token, as some decoders drop the space at the start of a text."""
        self._anchor_text = tokenizer.decode(self._anchor)
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text in UTF-8; of a special token its name; nothing for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def of_completion(self, token_id: int) -> str:
        r"""`bytes:\xe2\x82` where it is not text."""
        return self._name(token_id, "bytes:")

    def of_chat(self, token_id: int) -> str:
        r"""`\xe2\x82` where it is not text."""
        return self._name(token_id, "")

    def _name(self, token_id: int, prefix: str) -> str:
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in raw)

    def _find_bytes(self, token_id: int) -> bytes:
        text = self._tokenizer.decode([*self._anchor, token_id]).removeprefix(self._anchor_text)
        if text and _REPLACEMENT not in text:
            return text.encode()
        # The vocabulary's own spelling, which a tokenizer's text does not have: of special tokens and of raw bytes.
        piece: str | None = self._tokenizer._hf.convert_ids_to_tokens(token_id)
        if not piece:
            return text.encode()
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        if not text:
            return piece.encode()
        raw = bytes(_BYTES_BY_CHAR.get(char, 0) for char in piece)
        return raw if raw.decode(errors="replace") == text else text.encode()
