"""Names of spans: a BLAKE2b chain over token ids, the same in every process and after every restart.

Span `i` of a token sequence is tokens `[i * SPAN_TOKENS, (i + 1) * SPAN_TOKENS)`. Its id depends on every token up to
its end, on the model's fingerprint and on the tenant's salt, so equal ids mean equal state:

    seed   = blake2b(fingerprint, salt)
    id(0)  = blake2b(seed,    tokens of span 0)
    id(i)  = blake2b(id(i-1), tokens of span i)
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence

from mii_hcache.core.geometry import SPAN_TOKENS

SpanId = bytes
"""32 bytes."""

ID_BYTES = 32
_PERSON_SEED = b"hcache.seed.v1"
_PERSON_SPAN = b"hcache.span.v1"


def chain_seed(fingerprint: bytes, tenant_salt: bytes = b"") -> bytes:
    """The root of a tenant's chain for one model. Two salts never share a span."""
    digest = hashlib.blake2b(digest_size=ID_BYTES, person=_PERSON_SEED)
    for part in (fingerprint, tenant_salt):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian unsigned 32-bit integers. Raises OverflowError for a negative or too large id."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """Inverse of `pack_tokens`."""
    values = array("I")
    values.frombytes(packed)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def next_span_id(parent: bytes, packed_tokens: bytes) -> SpanId:
    """Id of the span that follows `parent` (the seed for the first span). `packed_tokens`: exactly one span's ids."""
    if len(packed_tokens) != 4 * SPAN_TOKENS:
        raise ValueError(f"a span has {SPAN_TOKENS} tokens, got {len(packed_tokens) / 4:g}")
    return hashlib.blake2b(parent + packed_tokens, digest_size=ID_BYTES, person=_PERSON_SPAN).digest()


def spans_of(seed: bytes, token_ids: Sequence[int]) -> Iterator[tuple[SpanId, bytes]]:
    """Each whole span of `token_ids` in order: its id and its packed token ids. The tail has no span."""
    parent = seed
    for stop in range(SPAN_TOKENS, len(token_ids) + 1, SPAN_TOKENS):
        packed = pack_tokens(token_ids[stop - SPAN_TOKENS : stop])
        parent = next_span_id(parent, packed)
        yield parent, packed
