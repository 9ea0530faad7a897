"""A conversation that is sent again keeps the token ids it had, whatever its text would tokenise to."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_kit import DictTexts

from mii_hcache.serve.answer import CONTEXT_TOKENS, AnswerText
from mii_hcache.serve.text import PromptEncoder

_USER = {"role": "user", "content": "Tell me about lighthouses."}
_NEXT = {"role": "user", "content": "And what then?"}
_STRIPS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_FORGETS_THOUGHTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WRITES_FOR_THE_MODEL = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>Sure! {% endif %}"
)
_REFUSES_A_TURN_AFTER = (
    "{% if messages | length > 2 %}{{ raise_exception('no more turns') }}{% endif %}"
    "{{ messages[0]['content'] }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def encoder(tokenizer, known_texts):
    return PromptEncoder(tokenizer, known_texts)


@pytest.fixture
def encoder_with(demo_path, known_texts, tmp_path):
    """An encoder over the demo tokenizer with another chat template."""
    from mii_hcache.engine.tokenizer import Tokenizer

    def make(template):
        for file in demo_path.iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "chat_template.jinja").write_text(template)
        return PromptEncoder(Tokenizer(tmp_path), known_texts)

    return make


def _answer(encoder, prompt, generated, *, stops=(), stop_token=True):
    """What the server does with generated tokens. The text that a client sees."""
    answer = AnswerText(encoder._tokenizer.decode, context=prompt.token_ids[-CONTEXT_TOKENS:], stops=stops)
    for token_id in generated:
        answer.push(token_id)
        if answer.stopped:
            break
    answer.finish()
    ending = [encoder._tokenizer.eos_token_id] if stop_token and not answer.stopped else []
    encoder.remember(prompt, answer, [*generated, *ending])
    return answer


def _said(answer):
    return {"role": "assistant", "content": answer.text}


def _starts_with(ids, beginning):
    return list(ids[: len(beginning)]) == list(beginning)


@given(generated=st.lists(st.integers(6, 2047), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_the_next_turn_starts_with_the_ids_of_the_last(tokenizer, generated):
    encoder = PromptEncoder(tokenizer, DictTexts())
    first = encoder.encode_chat([_USER])
    answer = _answer(encoder, first, generated)
    second = encoder.encode_chat([_USER, _said(answer), _NEXT])
    assert _starts_with(second.token_ids, [*first.token_ids, *generated, tokenizer.eos_token_id])
    assert second.miss_hint is None
    rest = f"</s>\n<|user|>\n{_NEXT['content']}</s>\n<|assistant|>\n"
    assert second.token_ids[len(first.token_ids) + len(generated) :] == tokenizer.encode(rest, add_special_tokens=False)


def test_five_turns_keep_every_id(encoder, tokenizer):
    rng = random.Random(0)
    messages, ids = [], []
    for turn in range(5):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        prompt = encoder.encode_chat(messages)
        assert _starts_with(prompt.token_ids, ids) and prompt.miss_hint is None
        generated = rng.choices(range(6, 2048), k=40)
        assert tokenizer.encode(tokenizer.decode(generated), add_special_tokens=False) != generated
        ids = [*prompt.token_ids, *generated]
        messages.append(_said(_answer(encoder, prompt, generated)))


def test_a_first_turn_is_tokenised_and_nothing_is_amiss(encoder, tokenizer):
    prompt = encoder.encode_chat([_USER])
    assert prompt.miss_hint is None
    assert prompt.token_ids == tokenizer.encode(prompt.text, add_special_tokens=False)
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 1


def test_an_edited_answer_is_text_changed_and_tokenised(encoder, tokenizer):
    answer = _answer(encoder, encoder.encode_chat([_USER]), list(range(300, 340)))
    edited = {"role": "assistant", "content": answer.text + " (edited)"}
    prompt = encoder.encode_chat([_USER, edited, _NEXT])
    # The known ids end where the edit starts: what was added is tokenised, the state before it still serves.
    assert prompt.miss_hint == "text_changed"
    replaced = {"role": "assistant", "content": "Something else."}
    prompt = encoder.encode_chat([_USER, replaced, _NEXT])
    assert prompt.miss_hint == "text_changed"
    assert prompt.token_ids == tokenizer.encode(prompt.text, add_special_tokens=False)


def test_an_edited_question_is_text_changed(encoder):
    answer = _answer(encoder, encoder.encode_chat([_USER]), list(range(300, 340)))
    prompt = encoder.encode_chat([{"role": "user", "content": "Tell me about towers."}, _said(answer), _NEXT])
    assert prompt.miss_hint == "text_changed"


def test_an_edit_of_the_second_answer_keeps_the_first(encoder):
    first = encoder.encode_chat([_USER])
    one = _answer(encoder, first, list(range(300, 340)))
    second = encoder.encode_chat([_USER, _said(one), _NEXT])
    _answer(encoder, second, list(range(340, 380)))
    prompt = encoder.encode_chat([_USER, _said(one), _NEXT, {"role": "assistant", "content": "No."}, _NEXT])
    assert prompt.miss_hint == "text_changed"
    assert _starts_with(prompt.token_ids, [*first.token_ids, *range(300, 340)])


def test_a_fork_after_an_answer_is_no_change(encoder):
    first = encoder.encode_chat([_USER])
    answer = _answer(encoder, first, list(range(300, 340)))
    for question in ("One?", "Two?"):
        prompt = encoder.encode_chat([_USER, _said(answer), {"role": "user", "content": question}])
        assert prompt.miss_hint is None and _starts_with(prompt.token_ids, [*first.token_ids, *range(300, 340)])


def test_asking_again_is_the_same_prompt(encoder):
    first = encoder.encode_chat([_USER])
    _answer(encoder, first, list(range(300, 340)))
    assert encoder.encode_chat([_USER]).token_ids == first.token_ids


def test_an_answer_without_text_does_not_change_its_prompt(encoder, tokenizer):
    first = encoder.encode_chat([_USER])
    special = tokenizer.encode("<|system|><|system|>", add_special_tokens=False)
    blank = tokenizer.encode(" \n", add_special_tokens=False)
    for generated in ([], special, blank):
        _answer(encoder, first, generated)
        assert encoder.encode_chat([_USER]).token_ids == first.token_ids


def test_tenants_do_not_share_texts(encoder):
    first = encoder.encode_chat([_USER], tenant=b"a")
    answer = _answer(encoder, first, list(range(300, 340)))
    turns = [_USER, _said(answer), _NEXT]
    assert _starts_with(encoder.encode_chat(turns, tenant=b"a").token_ids, [*first.token_ids, *range(300, 340)])
    for tenant in (b"b", b""):
        prompt = encoder.encode_chat(turns, tenant=tenant)
        assert prompt.miss_hint == "text_changed"
        assert not _starts_with(prompt.token_ids, [*first.token_ids, *range(300, 340)])


@pytest.mark.parametrize("template", [_STRIPS, _LLAMA_2], ids=["strips", "llama-2"])
@pytest.mark.parametrize("padding", ["", " \n", "\n\n"])
def test_templates_that_strip_or_put_space_around(encoder_with, tokenizer, template, padding):
    encoder = encoder_with(template)
    first = encoder.encode_chat([_USER])
    generated = tokenizer.encode(f"{padding} An answer.{padding}", add_special_tokens=False)
    generated += [700, 900, 128, *tokenizer.encode(padding, add_special_tokens=False)]
    answer = _answer(encoder, first, generated)
    second = encoder.encode_chat([_USER, _said(answer), _NEXT])
    assert second.miss_hint is None
    assert _starts_with(second.token_ids, [*first.token_ids, *generated])


def test_a_template_that_drops_more_than_space_lets_the_tokens_decide(encoder_with, tokenizer):
    encoder = encoder_with(_FORGETS_THOUGHTS)
    answer = _answer(
        encoder, encoder.encode_chat([_USER]), tokenizer.encode("hm</think>Yes.", add_special_tokens=False)
    )
    assert answer.text == "hm</think>Yes."
    second = encoder.encode_chat([_USER, _said(answer), _NEXT])
    assert second.miss_hint == "text_changed"
    assert second.token_ids == tokenizer.encode(second.text, add_special_tokens=False)


def test_a_template_that_puts_words_before_an_answer_lets_the_tokens_decide(encoder_with, tokenizer):
    """They are in the prompt that was answered, but not in the history that is sent again."""
    encoder = encoder_with(_WRITES_FOR_THE_MODEL)
    answer = _answer(encoder, encoder.encode_chat([_USER]), [300, 301, 302])
    second = encoder.encode_chat([_USER, _said(answer), _NEXT])
    assert second.miss_hint == "text_changed"
    assert second.token_ids == tokenizer.encode(second.text, add_special_tokens=False)


def test_a_template_that_refuses_the_next_turn_does_not_fail_this_one(encoder_with):
    encoder = encoder_with(_REFUSES_A_TURN_AFTER)
    assert _answer(encoder, encoder.encode_chat([_USER]), [300, 301]).text


def test_a_message_like_the_probe_is_harmless(encoder):
    turns = [{"role": "user", "content": "mii0hcache0probe0e7f3a1"}]
    answer = _answer(encoder, encoder.encode_chat(turns), list(range(300, 340)))
    encoder.encode_chat([*turns, _said(answer), _NEXT])


def test_a_stop_string_within_a_token_keeps_the_tokens_before_it(encoder, tokenizer):
    first = encoder.encode_chat([_USER])
    generated = tokenizer.encode("Yes, the lighthouse is tall.", add_special_tokens=False)
    answer = _answer(encoder, first, generated, stops=["ouse is"])
    assert answer.text == "Yes, the lighth"
    num_tokens, _ = answer.tokens_of_text()
    second = encoder.encode_chat([_USER, _said(answer), _NEXT])
    assert second.miss_hint is None
    assert _starts_with(second.token_ids, [*first.token_ids, *generated[:num_tokens]])
    plain = re.sub(r"</?s>|<\|\w+\|>", "", second.text)
    assert 0 < num_tokens < len(generated) and tokenizer.decode(second.token_ids) == plain


def test_plain_text_goes_on_from_its_own_ids(encoder, tokenizer):
    first = encoder.encode_text("The harbour")
    assert first.token_ids[0] == tokenizer.bos_token_id
    answer = _answer(encoder, first, list(range(300, 340)), stop_token=False)
    second = encoder.encode_text("The harbour" + answer.text + " and")
    assert second.token_ids == [
        *first.token_ids,
        *range(300, 340),
        *tokenizer.encode(" and", add_special_tokens=False),
    ]
    assert second.miss_hint is None


def test_plain_text_and_chat_are_different_keys(encoder, tokenizer):
    """The same text has BOS once more as a plain prompt; what one remembers must not change the other."""
    chat = encoder.encode_chat([_USER])
    answer = _answer(encoder, chat, list(range(300, 340)))
    plain = encoder.encode_text(chat.text + answer.text)
    assert plain.token_ids == tokenizer.encode(chat.text + answer.text, add_special_tokens=True)


def test_an_answer_after_half_a_character(encoder, tokenizer):
    """A remembered text may end within a character; the next answer starts with the rest of it."""
    euro = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(euro) > 1
    first = encoder.encode_text("It is")
    one = _answer(encoder, first, euro[:1], stop_token=False)
    assert one.text == "\ufffd"
    second = encoder.encode_text("It is" + one.text)
    assert second.token_ids == [*first.token_ids, euro[0]]
    two = _answer(encoder, second, [*euro[1:], 300], stop_token=False)
    third = encoder.encode_text("It is" + one.text + two.text)
    assert third.token_ids == [*first.token_ids, *euro, 300]


def test_a_model_with_another_vocabulary_does_not_take_the_ids(encoder, demo_path, known_texts, tmp_path):
    """One state directory may serve several models, one after the other; texts and templates can be the same."""
    from mii_hcache.engine.tokenizer import Tokenizer

    answer = _answer(encoder, encoder.encode_chat([_USER]), list(range(300, 340)))
    for file in demo_path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    del content["model"]["merges"][-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    other = Tokenizer(tmp_path)
    prompt = PromptEncoder(other, known_texts).encode_chat([_USER, _said(answer), _NEXT])
    assert prompt.miss_hint == "text_changed"
    assert prompt.token_ids == other.encode(prompt.text, add_special_tokens=False)


def test_token_ids_are_taken_as_they_are(encoder, known_texts):
    prompt = encoder.take_ids([5, 6, 7])
    assert prompt.token_ids == [5, 6, 7]
    _answer(encoder, prompt, list(range(300, 340)))
    assert known_texts.texts == {}
