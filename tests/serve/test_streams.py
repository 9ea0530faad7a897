"""Streams through OpenAI's own client: the pieces of what a whole reply would be."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve_kit import ASK, HCACHE_FIELDS, MODEL, bytes_of, says


def test_a_chat_stream_is_the_whole_answer_in_pieces(client):
    arguments = {"model": MODEL, "messages": ASK, "max_tokens": 200, "seed": 5, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and deltas[0].content == ""
    assert len(chunks) > 100
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert [hasattr(chunk, "hcache") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert list(chunks[-1].hcache) == HCACHE_FIELDS


def test_usage_at_the_end_of_a_stream(client):
    arguments = {"model": MODEL, "messages": ASK, "max_tokens": 20, "seed": 5}
    whole = client.chat.completions.create(**arguments)
    *chunks, last = client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.prompt_tokens_details.cached_tokens == last.hcache["resident_tokens"] > 0
    assert all(chunk.usage is None and not hasattr(chunk, "hcache") for chunk in chunks)


def test_a_stream_of_a_completion(client, service, tokenizer):
    says(service, tokenizer, " is tall.")
    *chunks, last = client.completions.create(model=MODEL, prompt="The tower", stream=True)
    assert "".join(chunk.choices[0].text for chunk in [*chunks, last]) == " is tall."
    assert last.choices[0].finish_reason == "stop" and list(last.hcache) == HCACHE_FIELDS


def test_the_wire_is_what_openai_sends(http, service, tokenizer):
    says(service, tokenizer, "Hello")
    body = {"messages": ASK, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] for event in events[:-2])


def test_characters_split_over_tokens(client, service, tokenizer):
    text = "Zürich €5 🦊🙂 日本語 e\u0301"
    ids = bytes_of(tokenizer, text)
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    service.script = lambda request: [*ids, 2]
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    ]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_an_answer_that_ends_within_a_character(client, service, tokenizer):
    ids = bytes_of(tokenizer, "a€")[:-1]
    service.script = lambda request: [*ids, 2]
    whole = client.chat.completions.create(model=MODEL, messages=ASK).choices[0].message.content
    chunks = client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole == "a\ufffd"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_list_of_stop_strings(client, service, tokenizer, stream):
    ids = bytes_of(tokenizer, "one two thr🦊 END of story")
    service.script = lambda request: [*ids, 2]
    stops = ["three", "🦊🦊", "EN of", "END of", "story", "d of s"]
    arguments = {"model": MODEL, "messages": ASK, "stop": stops}
    if stream:
        chunks = list(client.chat.completions.create(**arguments, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**arguments).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == ("one two thr🦊 ", "stop")
    assert len(service.finished[0].token_ids) == len("one two thr🦊 END of".encode())  # ended there, not at its end


def test_a_stop_string_completed_by_the_last_token(client, service, tokenizer):
    service.script = lambda request: bytes_of(tokenizer, "ab")
    reply = client.completions.create(model=MODEL, prompt="x", stop="b", max_tokens=2)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("a", "stop")


def test_many_at_once(client, service):
    service.step_s = 0.001

    def ask(seed):
        arguments = {"model": MODEL, "messages": ASK, "seed": seed, "max_tokens": 100}
        if seed % 2:
            return client.chat.completions.create(**arguments).choices[0].message.content
        chunks = client.chat.completions.create(**arguments, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == [ask(seed) for seed in range(16)]
