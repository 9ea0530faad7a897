"""Pieces of text from tokens, against brute force over the whole."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mii_hcache.serve.answer import AnswerText, Detokenizer, StopMatcher

_TEXTS = st.text(alphabet="ab€😀é �\n", max_size=40)


def _byte_decode(token_ids):
    """Tokens are bytes; 256 and up have no text, like special tokens."""
    return bytes(token_id for token_id in token_ids if token_id < 256).decode("utf-8", errors="replace")


def _spaced_decode(token_ids):
    """SentencePiece's way: token 1 is a word with a space before it, which is dropped at the start of a text."""
    return "".join({0: "x", 1: " y", 2: ""}[token_id] for token_id in token_ids).removeprefix(" ")


_BYTE_IDS = st.one_of(
    st.lists(st.integers(0, 257), max_size=60),
    st.lists(st.sampled_from([0xE2, 0xE2, 256, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0x61, 256]), max_size=60),
    _TEXTS.map(lambda text: list(text.encode())),
)


@given(ids=_BYTE_IDS)
@example(ids=[0xE2] * 8 + [256, 0x82, 0x82])  # a token without text after the start of a character
@settings(max_examples=1000)
def test_pieces_join_to_the_text_of_the_whole(ids):
    detokenizer = Detokenizer(_byte_decode)
    assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == _byte_decode(ids)


@given(ids=_BYTE_IDS, cut=st.integers(0, 60))
@example(ids=[0xF0, 0x9F, 0x98], cut=2)
def test_a_prompt_before_the_answer_changes_nothing(ids, cut):
    prompt, answer = ids[:cut], ids[cut:]
    detokenizer = Detokenizer(_byte_decode, prompt[-6:])
    pieces = [*map(detokenizer.push, answer), detokenizer.flush()]
    if _byte_decode(prompt[-6:]).endswith("\ufffd"):  # within a character: the answer stands alone
        assert "".join(pieces) == _byte_decode(answer)
    else:
        assert "".join(pieces) == _byte_decode(prompt + answer)[len(_byte_decode(prompt)) :]


@given(ids=_BYTE_IDS)
def test_demo_tokens_too(tokenizer, ids):
    ids = [token_id * 7 % 2048 for token_id in ids]
    detokenizer = Detokenizer(tokenizer.decode)
    assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == tokenizer.decode(ids)


@given(text=_TEXTS)
def test_no_replacement_character_while_a_character_is_incomplete(text):
    detokenizer = Detokenizer(_byte_decode)
    shown = ""
    for byte in text.encode():
        shown += detokenizer.push(byte)
        assert text.startswith(shown)
    assert shown + detokenizer.flush() == text


def test_text_comes_as_soon_as_it_is_certain():
    detokenizer = Detokenizer(_byte_decode)
    assert [detokenizer.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]


def test_bytes_that_are_not_utf8_do_not_wait_for_the_end():
    detokenizer = Detokenizer(_byte_decode)
    shown = "".join(detokenizer.push(0xFF) for _ in range(1000))
    assert len(shown) >= 990
    assert detokenizer.num_pending < 10  # a window that grew would make each step slower than the last


def test_few_tokens_are_decoded_at_each_step():
    longest = 0

    def decode(token_ids):
        nonlocal longest
        longest = max(longest, len(token_ids))
        return _byte_decode(token_ids)

    detokenizer = Detokenizer(decode, list(b"prompt"))
    for byte in list("a€😀".encode()) * 50 + [0xFF, 256] * 50:
        detokenizer.push(byte)
    assert longest <= 20


@given(ids=st.lists(st.integers(0, 2), max_size=30), cut=st.integers(1, 10))
def test_a_space_before_a_word_survives_within_a_text(ids, cut):
    prompt = [0, *ids][:cut]
    answer = [0, *ids][cut:]
    detokenizer = Detokenizer(_spaced_decode, prompt)
    pieces = [*map(detokenizer.push, answer), detokenizer.flush()]
    assert _spaced_decode(prompt) + "".join(pieces) == _spaced_decode(prompt + answer)


def _cut_at_first_stop(text, stops):
    """Try every end in order; of the stop strings that end there, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    text=st.text(alphabet="abc", max_size=60),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=8),
    cuts=st.lists(st.integers(1, 9), min_size=1),
)
@settings(max_examples=500)
def test_the_cut_is_that_of_brute_force(text, stops, cuts):
    matcher, shown, at, stopped = StopMatcher(stops), "", 0, False
    expected, expected_stop = _cut_at_first_stop(text, stops)
    for idx in range(len(text)):
        piece, stopped = matcher.push(text[at : at + cuts[idx % len(cuts)]])
        at += cuts[idx % len(cuts)]
        shown += piece
        assert expected.startswith(shown)
        if stopped or at >= len(text):
            break
    shown += "" if stopped else matcher.flush()
    assert (shown, stopped) == (expected, expected_stop)


@given(text=st.text(alphabet="ab", max_size=30), stops=st.lists(st.text(alphabet="ab", min_size=1), min_size=1))
def test_only_what_may_start_a_stop_string_is_held_back(text, stops):
    shown, stopped = StopMatcher(stops).push(text)
    if not stopped:
        held = text[len(shown) :]
        starts = [tail for tail in (text[idx:] for idx in range(len(text))) if any(s.startswith(tail) for s in stops)]
        assert held == (starts[0] if starts else "")


def test_a_long_list_of_long_stop_strings():
    stops = [f"{idx:05d}" + "x" * 50 for idx in range(1000)]
    matcher = StopMatcher(stops)
    assert matcher.push("a00999" + "x" * 49) == ("a", False)
    assert matcher.push("x") == ("", True)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])


@given(ids=_BYTE_IDS, stops=st.lists(st.text(alphabet="ab€é\ufffd", min_size=1, max_size=3), max_size=3))
@settings(max_examples=500)
def test_answer_text_and_its_tokens(ids, stops):
    answer = AnswerText(_byte_decode, stops=stops)
    pieces, seen = [], []
    for token_id in ids:
        pieces.append(answer.push(token_id))
        if answer.stopped:
            break
        seen.append(answer.num_shown_tokens)
    num_pushed = len(pieces)
    pieces.append(answer.finish())
    assert seen == sorted(seen)
    expected, stopped = _cut_at_first_stop(_byte_decode(ids), stops)
    assert answer.text == "".join(pieces)
    assert (answer.text, answer.stopped) == (expected, stopped)

    num_tokens, rest = answer.tokens_of_text()
    assert num_tokens <= answer.num_shown_tokens <= num_pushed
    assert _byte_decode(ids[: answer.num_shown_tokens]).startswith(answer.text)
    assert (answer.num_shown_tokens > num_tokens) == (rest != "")
    assert _byte_decode(ids[:num_tokens]) + rest == answer.text
    if not stopped:
        assert (num_tokens, rest) == (len(ids), "")


def test_tokens_after_a_stop_are_ignored():
    answer = AnswerText(_byte_decode, stops=["b"])
    assert [answer.push(byte) for byte in b"abc"] == ["a", "", ""]
    assert answer.finish() == "" and answer.text == "a"
    assert answer.tokens_of_text() == (1, "")


def test_a_stop_string_that_starts_within_a_token():
    pieces = {1: "Hello", 2: " wor", 3: "ld!"}
    answer = AnswerText(lambda ids: "".join(pieces[token_id] for token_id in ids), stops=["orl", "orld"])
    assert [answer.push(token_id) for token_id in (1, 2, 3)] == ["Hell", "o w", ""]
    assert answer.stopped and answer.tokens_of_text() == (1, " w")
