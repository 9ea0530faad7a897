"""Logprobs and echo, in both of OpenAI's forms, through its own client."""

import json
import math

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_kit import ASK, MODEL, bytes_of, logprob_for, says

from mii_hcache.runtime.generation import TokenLogprob
from mii_hcache.serve.logprobs import Scored, chat_logprobs, completion_logprobs, offsets_of
from mii_hcache.serve.token_names import TokenNames

PROMPTS = {"text": "The harbour €5", "ids": [1, 300, 301, 302]}


@pytest.fixture
def names(tokenizer):
    return TokenNames(tokenizer)


def _expected(names, prompt_ids, answer_ids, num_top, *, echo):
    """By the fake engine's rule; without offsets."""
    tokens = [*prompt_ids, *answer_ids]
    told = [logprob_for(position, token_id, num_top) for position, token_id in enumerate(tokens)]
    start = 0 if echo else len(prompt_ids)
    top = [{names.of_completion(token_id): logprob for token_id, logprob in reversed(one.top)} for one in told]
    return {
        "tokens": [names.of_completion(token_id) for token_id in tokens[start:]],
        "token_logprobs": [None if idx == 0 else told[idx].logprob for idx in range(start, len(tokens))],
        "top_logprobs": [None if idx == 0 else top[idx] for idx in range(start, len(tokens))] if num_top else None,
    }


def _merged(chunks):
    """A choice of the whole reply, put together from those of a stream."""
    text, merged = "", {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        text += choice.text
        for name in merged if choice.logprobs else ():
            merged[name] += getattr(choice.logprobs, name) or []
    return text, merged


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("echo", [False, True], ids=["answer", "echo"])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_completion_logprobs(client, service, tokenizer, names, prompt, echo, num_top):
    ids = says(service, tokenizer, " is tall. Zürich 🦊!")
    arguments = {"model": MODEL, "prompt": prompt, "max_tokens": 50, "echo": echo, "logprobs": num_top}
    reply = client.completions.create(**arguments)
    prompt_ids = list(service.submitted[0].prompt_token_ids)
    prompt_text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    (choice,) = reply.choices
    assert choice.text == prompt_text * echo + " is tall. Zürich 🦊!"
    logprobs = choice.logprobs.to_dict()
    offsets = logprobs.pop("text_offset")
    assert logprobs == _expected(names, prompt_ids, ids, num_top, echo=echo)  # the end token is no text: not listed
    shown = choice.text if echo else prompt_text + choice.text
    assert offsets[0] == (0 if echo else len(prompt_text))
    assert offsets == sorted(offsets) and len(offsets) == len(logprobs["tokens"])
    for token, offset in zip(logprobs["tokens"], offsets, strict=True):
        assert token in ("<s>",) or token.startswith("bytes:\\x") or shown.startswith(token, offset)

    text, merged = _merged(client.completions.create(**arguments, stream=True))
    assert text == choice.text
    assert merged == {**logprobs, "top_logprobs": logprobs["top_logprobs"] or [], "text_offset": offsets}


def test_a_batch_of_prompts(client, service, names):
    arguments = {"model": MODEL, "prompt": [[5, 300], [7, 301, 302]], "max_tokens": 3, "echo": True, "logprobs": 2}
    reply = client.completions.create(**arguments, extra_body={"ignore_eos": True})
    for choice, request in zip(reply.choices, service.submitted, strict=True):
        logprobs = choice.logprobs.to_dict()
        del logprobs["text_offset"]
        assert logprobs == _expected(names, request.prompt_token_ids, service.script(request), 2, echo=True)


def test_echo_without_logprobs(client, service, tokenizer):
    says(service, tokenizer, " is tall.")
    for prompt, text in (("The tower", "The tower"), (tokenizer.encode("So", add_special_tokens=True), "So")):
        arguments = {"model": MODEL, "prompt": prompt, "echo": True}
        reply = client.completions.create(**arguments)
        assert (reply.choices[0].text, reply.choices[0].logprobs) == (text + " is tall.", None)
        first, *rest = client.completions.create(**arguments, stream=True)
        assert first.choices[0].text == text  # at once, not with the first token
        assert "".join(chunk.choices[0].text for chunk in rest) == " is tall."
    assert [request.num_top_logprobs for request in service.submitted] == [None] * 4


def test_what_is_echoed_is_not_part_of_the_answer_that_is_remembered(client, service, known):
    client.completions.create(model=MODEL, prompt="The tower", echo=True, logprobs=1, max_tokens=5)
    reply = client.completions.create(model=MODEL, prompt="The tower", max_tokens=5)
    ((_, text),) = known.texts
    assert text.endswith("The tower" + reply.choices[0].text)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_nothing_is_generated_for_a_prompt_that_is_only_scored(client, service, names, known, stream):
    service.script = lambda request: [2]  # the token that the engine cannot help generating is even an end token
    arguments = {"model": MODEL, "prompt": [5, 300, 301], "max_tokens": 0, "echo": True, "logprobs": 1}
    if stream:
        chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
        (_, logprobs), usage = _merged(chunks), chunks[-1].usage
        reason = [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1]
    else:
        reply = client.completions.create(**arguments)
        usage, reason = reply.usage, reply.choices[0].finish_reason
        logprobs = reply.choices[0].logprobs.to_dict()
    assert reason == "length" and (usage.prompt_tokens, usage.completion_tokens) == (3, 0)
    del logprobs["text_offset"]
    assert logprobs == _expected(names, [5, 300, 301], [], 1, echo=True)
    assert known.texts == {}


def test_nothing_asked_nothing_answered(client):
    reply = client.completions.create(model=MODEL, prompt=[5, 300], max_tokens=0)
    assert (reply.choices[0].text, reply.usage.completion_tokens) == ("", 0)


@pytest.mark.parametrize("num_top", [0, 3])
def test_chat_logprobs(client, service, tokenizer, num_top):
    text = "Zürich €5 🦊"
    ids = bytes_of(tokenizer, text)
    service.script = lambda request: [*ids, tokenizer.eos_token_id]
    arguments = {"model": MODEL, "messages": ASK, "logprobs": True, "top_logprobs": num_top}
    whole = client.chat.completions.create(**arguments).choices[0].logprobs
    assert whole.refusal is None
    num_prompt = len(service.submitted[0].prompt_token_ids)
    expected = [logprob_for(num_prompt + idx, token_id, num_top) for idx, token_id in enumerate(ids)]
    assert [entry.logprob for entry in whole.content] == [one.logprob for one in expected]
    assert b"".join(bytes(entry.bytes) for entry in whole.content) == text.encode()
    assert [entry.token for entry in whole.content[:3]] == ["Z", "\\xc3", "\\xbc"]
    for entry, one in zip(whole.content, expected, strict=True):
        assert [other.logprob for other in entry.top_logprobs] == [logprob for _, logprob in one.top]
        assert [other.token for other in entry.top_logprobs] == [
            TokenNames(tokenizer).of_chat(token_id) for token_id, _ in one.top
        ]
    streamed = []
    for chunk in client.chat.completions.create(**arguments, stream=True):
        logprobs = chunk.choices[0].logprobs
        assert (logprobs is not None) == bool(chunk.choices[0].delta.content)
        streamed += logprobs.content if logprobs else []
    assert streamed == whole.content


def test_only_tokens_of_the_shown_text_are_listed(client, service, tokenizer):
    """A stop string that starts within a token shows a part of it; those after it are not shown."""
    generated = tokenizer.encode("Yes, the lighthouse is tall.", add_special_tokens=False)
    service.script = lambda request: generated
    arguments = {"model": MODEL, "messages": ASK, "logprobs": True, "stop": ["ouse is"]}
    choice = client.chat.completions.create(**arguments).choices[0]
    shown = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode()
    assert choice.message.content == "Yes, the lighth"
    assert shown.startswith("Yes, the lighth") and len(shown) > len("Yes, the lighth")
    assert len(choice.logprobs.content) < len(generated) - 2
    chunks = client.chat.completions.create(**arguments, stream=True)
    streamed = [entry for chunk in chunks if (told := chunk.choices[0].logprobs) for entry in told.content]
    assert streamed == choice.logprobs.content


def test_a_stream_lists_no_token_before_its_text(client, service, tokenizer):
    """The second `b` comes while the first `bc` is let go, and is then cut as the start of the stop string."""
    service.script = lambda request: bytes_of(tokenizer, "bcbcd")
    arguments = {"model": MODEL, "prompt": "x", "max_tokens": 5, "logprobs": 1, "stop": ["bcd"], "stream": True}
    text, logprobs = _merged(client.completions.create(**arguments))
    assert (text, logprobs["tokens"]) == ("bc", ["b", "c"])


@pytest.mark.parametrize("logprobs", [-1, 21, True, 1.5, "1"])
def test_counts_out_of_range(client, logprobs):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", logprobs=logprobs)
    assert caught.value.param == "logprobs"


def test_false_is_none(client):
    assert client.completions.create(model=MODEL, prompt="x", logprobs=False).choices[0].logprobs is None


def test_impossible_tokens_are_json(names):
    told = TokenLogprob(token_id=300, logprob=-math.inf, top=((301, math.nan), (302, -math.inf)))
    for form in (completion_logprobs(names, 2), chat_logprobs(names, 2)):
        text = json.dumps(form([Scored(300, 0, told)]), allow_nan=False)
        assert text.count("-9999.0") == 3


def test_of_two_tokens_with_one_name_the_likelier_counts(names):
    told = TokenLogprob(token_id=300, logprob=-1.0, top=((5000, -1.0), (5001, -2.0)))  # ids without a token
    assert completion_logprobs(names, 2)([Scored(300, 0, told)])["top_logprobs"] == [{"": -1.0}]


# --- names of tokens -------------------------------------------------------------------------------------------------


@given(text=st.text(max_size=40))
@settings(deadline=None)
def test_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer, text):
    names = TokenNames(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(names.bytes_of, ids)) == text.encode()


def test_every_token_has_a_name_of_its_own(names, tokenizer):
    everything = [names.of_completion(token_id) for token_id in range(tokenizer.vocab_size)]
    assert len(set(everything)) == tokenizer.vocab_size
    assert everything[tokenizer.eos_token_id] == "</s>"
    assert sum(name.startswith("bytes:\\x") for name in everything) >= 128


def test_names_with_sentencepiece(tmp_path):
    """Llama 2's kind: a space is a character of its own, bytes are tokens, the first space of a text is dropped."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    from mii_hcache.engine.tokenizer import Tokenizer

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "o", "▁t", "▁to", "0", "▁0"]
    merges = [("▁", "t"), ("▁t", "o"), ("▁", "0")]
    model = models.BPE({piece: idx for idx, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    names = TokenNames(tokenizer)
    ids = tokenizer.encode("to to€", add_special_tokens=False)
    assert [names.of_completion(token_id) for token_id in ids] == [
        " to", " to", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac",
    ]  # fmt: skip
    assert names.of_chat(1) == "</s>"
    assert offsets_of(tokenizer.decode, ids) == [0, 2, 5, 5, 5]
