"""Equal ids mean equal state: the same in every process, different for whatever differs."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.identity import (
    ID_BYTES,
    chain_seed,
    next_span_id,
    pack_tokens,
    spans_of,
    unpack_tokens,
)

token_ids = st.integers(0, 2**32 - 1)
# A base repeated and then changed in places: long enough for several spans, cheap to draw.
sequences = st.builds(
    lambda base, length, changes: [changes.get(idx, base[idx % len(base)]) for idx in range(length)],
    base=st.lists(token_ids, min_size=1, max_size=5),
    length=st.integers(0, 5 * SPAN_TOKENS + 1),
    changes=st.dictionaries(st.integers(0, 5 * SPAN_TOKENS), token_ids, max_size=4),
)

STORED_SEED = "1f9e58bb4006095cc831f2cda96ff246bab8916498edf1404d0f8d58330da714"
STORED_IDS = [
    "d3e9cb3c65cdc1274e20c23df0027dbaa2c703d1da8cf062ae7dfa9b322bc3b3",
    "1c3f3937c395a69d3caf0da87d5194df5e7bb2ac3912a5a4a9e64dff29a60b58",
]
"""Seed of (b"model", b"tenant"), and the ids of tokens 0, 1, 2, ... These are on people's disks: if they change, all
that was ever saved is lost."""


def _ids(tokens: list[int], seed: bytes = b"") -> list[bytes]:
    return [span_id for span_id, _ in spans_of(seed or chain_seed(b"model"), tokens)]


def test_ids_are_those_on_disk():
    seed = chain_seed(b"model", b"tenant")
    assert seed.hex() == STORED_SEED
    assert [span_id.hex() for span_id in _ids(list(range(130)), seed)] == STORED_IDS


def test_the_chain_is_what_its_docstring_says():
    parent = hashlib.blake2b(
        struct.pack("<Q", 5) + b"model" + struct.pack("<Q", 6) + b"tenant", digest_size=32, person=b"hcache.seed.v1"
    ).digest()
    for span_idx, stored in enumerate(STORED_IDS):
        tokens = range(SPAN_TOKENS * span_idx, SPAN_TOKENS * (span_idx + 1))
        parent = hashlib.blake2b(
            parent + struct.pack("<64I", *tokens), digest_size=32, person=b"hcache.span.v1"
        ).digest()
        assert parent.hex() == stored


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_ids_are_the_same_in_another_process(hash_seed):
    script = (
        "from mii_hcache.core.identity import chain_seed, spans_of\n"
        "seed = chain_seed(b'model', b'tenant')\n"
        "print(*[span_id.hex() for span_id, _ in spans_of(seed, range(130))])"
    )
    env = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    out = subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True)
    assert out.stdout.split() == STORED_IDS


@given(tokens=sequences)
def test_one_id_for_each_whole_span_and_none_for_the_tail(tokens):
    spans = list(spans_of(chain_seed(b"model"), tokens))
    assert len(spans) == len(tokens) // SPAN_TOKENS
    assert all(len(span_id) == ID_BYTES for span_id, _ in spans)
    named = [token for _, packed in spans for token in unpack_tokens(packed)]
    assert named == tokens[: len(spans) * SPAN_TOKENS]


@given(tokens=sequences, data=st.data())
def test_a_prefix_has_the_first_ids_of_the_whole(tokens, data):
    length = data.draw(st.integers(0, len(tokens)))
    assert _ids(tokens[:length]) == _ids(tokens)[: length // SPAN_TOKENS]


@given(tokens=sequences, more=sequences)
def test_the_chain_can_be_continued_from_its_last_id(tokens, more):
    whole = tokens[: len(tokens) // SPAN_TOKENS * SPAN_TOKENS]
    parent = (_ids(whole) or [chain_seed(b"model")])[-1]
    assert _ids(whole) + _ids(more, parent) == _ids(whole + more)


@given(tokens=sequences.filter(len), data=st.data())
def test_a_changed_token_changes_its_span_and_all_after_it(tokens, data):
    position = data.draw(st.integers(0, len(tokens) - 1))
    changed = list(tokens)
    changed[position] = data.draw(token_ids.filter(lambda token: token != tokens[position]))
    before, after = _ids(tokens), _ids(changed)
    first = position // SPAN_TOKENS
    assert before[:first] == after[:first]
    assert not set(before[first:]) & set(after[first:])


@given(tokens=sequences)
def test_no_two_spans_of_a_sequence_share_an_id(tokens):
    ids = _ids(tokens)
    assert len(set(ids)) == len(ids)


@given(first=st.tuples(st.binary(max_size=6), st.binary(max_size=6)), second=st.tuples(st.binary(), st.binary()))
def test_models_and_tenants_never_share_a_span(first, second):
    tokens = list(range(2 * SPAN_TOKENS))
    shared = set(_ids(tokens, chain_seed(*first))) & set(_ids(tokens, chain_seed(*second)))
    assert bool(shared) == (first == second)


@given(fingerprint=st.binary(max_size=20), salt=st.binary(max_size=20), cut=st.integers(0, 40))
def test_fingerprint_and_salt_do_not_run_into_each_other(fingerprint, salt, cut):
    joined = fingerprint + salt
    other = joined[:cut], joined[cut:]
    assert (chain_seed(fingerprint, salt) == chain_seed(*other)) == (other == (fingerprint, salt))


@given(tokens=st.lists(token_ids, max_size=200))
def test_packing_keeps_every_id_in_four_little_endian_bytes(tokens):
    packed = pack_tokens(tokens)
    assert packed == struct.pack(f"<{len(tokens)}I", *tokens)
    assert unpack_tokens(packed) == tokens


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_an_id_that_does_not_fit_is_an_error_not_another_token(token_id):
    with pytest.raises(OverflowError):
        pack_tokens([1, token_id])


@pytest.mark.parametrize("num_tokens", [0, 63, 65, 128])
def test_only_whole_spans_have_ids(num_tokens):
    with pytest.raises(ValueError, match=f"a span has 64 tokens, got {num_tokens}"):
        next_span_id(bytes(32), pack_tokens(range(num_tokens)))
