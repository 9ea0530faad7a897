"""Hashes of many prefixes of one text, each character hashed about once."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

STEP_CHARS = 256
"""Distance of the anchors: prefixes whose hashes lead to the longer texts that begin with them."""

_PERSON = b"hcache.text.v1"


class RollingText:
    """One tenant's text. Equal tenant and prefix give equal hashes, in every process; different ones never do.

    Pure; not for use by two threads at once.
    """

    def __init__(self, tenant: bytes, text: str) -> None:
        self._seed = hashlib.blake2b(struct.pack("<Q", len(tenant)) + tenant, digest_size=32, person=_PERSON)
        self._text = text

    def anchors(self) -> Iterator[tuple[int, bytes, hashlib.blake2b]]:
        """For each multiple of STEP_CHARS up to the text's length: the multiple, its prefix's hash, and a hasher that
        has seen this prefix (copy it before the next step if you keep it)."""
        hasher = self._seed.copy()
        for start in range(0, len(self._text) + 1, STEP_CHARS):
            yield start, hasher.digest(), hasher
            hasher.update(_encode(self._text[start : start + STEP_CHARS]))

    def whole(self) -> tuple[bytes, bytes]:
        """Hash of the whole text, and its last anchor."""
        hasher = self._seed.copy()
        start = len(self._text) // STEP_CHARS * STEP_CHARS
        hasher.update(_encode(self._text[:start]))
        return self.hash_at(len(self._text), start, hasher), hasher.digest()

    def hash_at(self, num_chars: int, start: int, hasher: hashlib.blake2b) -> bytes:
        """Hash of the first `num_chars` characters; `hasher` has seen the first `start`."""
        hasher = hasher.copy()
        hasher.update(_encode(self._text[start:num_chars]))
        return hasher.digest()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
