"""The server through OpenAI's own client, over loopback, with an engine whose answers the test chooses."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from serve_kit import DictTexts, FakeService, live_server, tokens_for, wait_until

from mii_hcache.errors import RequestError
from mii_hcache.serve.app import create_app

_MODEL = "demo/model"
_ASK = [{"role": "user", "content": "Tell me about lighthouses."}]
_HCACHE = [
    "resident_tokens",
    "restored_tokens",
    "restored_from",
    "method",
    "restore_ms",
    "prefill_tokens",
    "ttft_ms",
    "miss_reason",
]


@pytest.fixture(scope="module")
def live(tokenizer):
    service = FakeService()
    known_texts = DictTexts()
    app = create_app(service, tokenizer, known_texts, _MODEL, max_body_bytes=100_000)
    with live_server(app) as url:
        yield app, service, known_texts, url
    service.close()


@pytest.fixture
def service(live):
    app, service, known_texts, _ = live
    service.reset()
    known_texts.texts.clear()
    yield service
    app.state.answering.draining = False


@pytest.fixture
def known(live, service):
    return live[2]


@pytest.fixture
def http(live, service):
    with httpx.Client(base_url=live[3], timeout=10) as http:
        yield http


@pytest.fixture
def client(live, service):
    with openai.OpenAI(base_url=live[3] + "/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


def _says(service, tokenizer, text):
    """Make the engine generate these tokens, then the end token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    service.script = lambda request: [*ids, tokenizer.eos_token_id]
    return ids


def _bytes_of(tokenizer, text):
    """A token per byte, as a model might split any text."""
    from tokenizers import pre_tokenizers

    backend = tokenizer._backend
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    return [backend.token_to_id(char) for char in mapped]


# --- whole replies -------------------------------------------------------------------------------------------------


def test_a_chat_answer(client, service, tokenizer):
    ids = _says(service, tokenizer, "It is a tall tower.")
    reply = client.chat.completions.create(model=_MODEL, messages=_ASK)
    assert reply.object == "chat.completion" and reply.model == _MODEL and reply.id.startswith("chatcmpl-")
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "It is a tall tower.")
    assert (choice.index, choice.finish_reason) == (0, "stop")
    prompt = tokenizer.encode(tokenizer.render_chat(_ASK, add_generation_prompt=True), add_special_tokens=False)
    assert service.submitted[0].prompt_token_ids == prompt
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == len(ids) + 1
    assert reply.usage.total_tokens == len(prompt) + len(ids) + 1
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    assert list(reply.hcache) == _HCACHE
    assert reply.hcache["prefill_tokens"] == len(prompt) and reply.hcache["ttft_ms"] > 0


def test_a_second_turn_is_cached_to_the_end_of_the_first_answer(client, service):
    messages = list(_ASK)
    first = client.chat.completions.create(
        model=_MODEL, messages=messages, max_tokens=60, extra_body={"ignore_eos": True}
    )
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "And then?"})
    second = client.chat.completions.create(model=_MODEL, messages=messages, max_tokens=5)
    assert second.hcache["resident_tokens"] == first.usage.prompt_tokens + 60
    assert second.usage.prompt_tokens_details.cached_tokens == second.hcache["resident_tokens"]
    assert second.hcache["prefill_tokens"] == second.usage.prompt_tokens - second.hcache["resident_tokens"]
    assert second.hcache["miss_reason"] is None


def test_restored_tokens_are_reported(client, service):
    client.chat.completions.create(model=_MODEL, messages=_ASK, max_tokens=5)
    service.restored_from = "file"
    reply = client.chat.completions.create(model=_MODEL, messages=_ASK, max_tokens=5)
    num_tokens = reply.usage.prompt_tokens
    ttft_ms = reply.hcache.pop("ttft_ms")
    assert ttft_ms == round(ttft_ms, 3)
    assert reply.hcache == {
        "resident_tokens": 0,
        "restored_tokens": num_tokens - 1,
        "restored_from": "file",
        "method": "hidden",
        "restore_ms": 1.235,
        "prefill_tokens": 1,
        "miss_reason": None,
    }
    assert reply.usage.prompt_tokens_details.cached_tokens == num_tokens - 1


def test_an_edited_history_is_reported(client):
    messages = [*_ASK, {"role": "assistant", "content": "Never said."}, {"role": "user", "content": "What?"}]
    reply = client.chat.completions.create(model=_MODEL, messages=messages, max_tokens=5)
    assert reply.hcache["miss_reason"] == "text_changed"


def test_cache_salt_separates_tenants(client, service):
    for salt, cached in ((None, False), (None, True), ("a", False), ("a", True), ("b", False)):
        body = {} if salt is None else {"cache_salt": salt}
        reply = client.chat.completions.create(model=_MODEL, messages=_ASK, max_tokens=5, extra_body=body)
        assert (reply.hcache["resident_tokens"] > 0) == cached
    assert [request.tenant_salt for request in service.submitted] == [b"", b"", b"a", b"a", b"b"]


def test_content_parts_and_developer_messages(client, service, tokenizer):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
    ]
    client.chat.completions.create(model=_MODEL, messages=messages, max_tokens=1)
    text = "<s><|system|>\nBe brief.</s>\n<|user|>\nOne.\nTwo.</s>\n<|assistant|>\n"
    assert service.submitted[0].prompt_token_ids == tokenizer.encode(text, add_special_tokens=False)


def test_a_completion_of_text(client, service, tokenizer):
    _says(service, tokenizer, " is tall.")
    reply = client.completions.create(model=_MODEL, prompt="The tower")
    assert reply.object == "text_completion" and reply.choices[0].text == " is tall."
    assert service.submitted[0].prompt_token_ids == tokenizer.encode("The tower", add_special_tokens=True)
    again = client.completions.create(model=_MODEL, prompt="The tower is tall. And")
    assert again.hcache["resident_tokens"] == reply.usage.prompt_tokens + reply.usage.completion_tokens - 1


def test_token_ids_are_taken_as_they_are(client, service):
    reply = client.completions.create(model=_MODEL, prompt=[1, 999, 7, 7, 1500], max_tokens=3)
    assert service.submitted[0].prompt_token_ids == [1, 999, 7, 7, 1500]
    assert reply.usage.prompt_tokens == 5


@pytest.mark.parametrize("prompts", [["One", "Two", "Three"], [[5, 6], [7, 8, 9], [10]]], ids=["texts", "ids"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_several_prompts_are_several_choices(client, service, tokenizer, prompts, stream):
    arguments = {"model": _MODEL, "prompt": prompts, "max_tokens": 20}
    if stream:
        texts = ["", "", ""]
        own = {}
        *chunks, reply = client.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
        assert not any(chunk.usage or hasattr(chunk, "hcache") for chunk in chunks)
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.finish_reason:
                    own[choice.index] = choice.hcache
        own = [own[idx] for idx in range(3)]
    else:
        reply = client.completions.create(**arguments)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        texts = [choice.text for choice in reply.choices]
        own = [choice.hcache for choice in reply.choices]
    expected = []
    for request in service.submitted:
        ids = service.script(request)
        ids = ids[: ids.index(2)] if 2 in ids else ids
        expected.append(
            tokenizer.decode([*request.prompt_token_ids, *ids])[len(tokenizer.decode(request.prompt_token_ids)) :]
        )
    assert texts == expected
    assert reply.usage.prompt_tokens == sum(len(request.prompt_token_ids) for request in service.submitted)
    assert reply.usage.completion_tokens == sum(len(result.token_ids) for result in service.finished)
    assert reply.hcache["prefill_tokens"] == sum(hcache["prefill_tokens"] for hcache in own)


def test_default_lengths(client, service):
    client.completions.create(model=_MODEL, prompt=[5] * 10, extra_body={"ignore_eos": True})
    client.completions.create(model=_MODEL, prompt=[5] * 510, extra_body={"ignore_eos": True})
    client.chat.completions.create(model=_MODEL, messages=_ASK)
    client.chat.completions.create(model=_MODEL, messages=_ASK, max_tokens=9, max_completion_tokens=8)
    lengths = [request.sampling.max_new_tokens for request in service.submitted]
    assert lengths == [16, 2, 512 - len(service.submitted[2].prompt_token_ids), 8]


def test_sampling_settings_reach_the_engine(client, service, tokenizer):
    client.chat.completions.create(
        model=_MODEL,
        messages=_ASK,
        temperature=0.5,
        top_p=0.9,
        seed=-7,
        extra_body={"top_k": 40, "stop_token_ids": [9]},
    )
    client.chat.completions.create(
        model=_MODEL, messages=_ASK, max_tokens=3, extra_body={"top_k": -1, "ignore_eos": True}
    )
    one, two = (request.sampling for request in service.submitted)
    assert (one.temperature, one.top_p, one.top_k, one.seed) == (0.5, 0.9, 40, -7)
    assert one.stop_token_ids == {tokenizer.eos_token_id, 9}
    assert (two.temperature, two.top_p, two.top_k, two.seed) == (1.0, 1.0, 0, None)
    assert two.stop_token_ids == frozenset()


def test_finish_reason_length(client, service, tokenizer):
    _says(service, tokenizer, "one two three four five six seven eight")
    reply = client.chat.completions.create(model=_MODEL, messages=_ASK, max_tokens=3)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 3


# --- streams -------------------------------------------------------------------------------------------------------


def test_a_chat_stream_is_the_whole_answer_in_pieces(client):
    arguments = {"model": _MODEL, "messages": _ASK, "max_tokens": 200, "seed": 5, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and deltas[0].content == ""
    assert len(chunks) > 100
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert [hasattr(chunk, "hcache") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert list(chunks[-1].hcache) == _HCACHE


def test_usage_at_the_end_of_a_stream(client):
    arguments = {"model": _MODEL, "messages": _ASK, "max_tokens": 20, "seed": 5}
    whole = client.chat.completions.create(**arguments)
    *chunks, last = client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.prompt_tokens_details.cached_tokens == last.hcache["resident_tokens"] > 0
    assert all(chunk.usage is None and not hasattr(chunk, "hcache") for chunk in chunks)


def test_a_stream_of_a_completion(client, service, tokenizer):
    _says(service, tokenizer, " is tall.")
    *chunks, last = client.completions.create(model=_MODEL, prompt="The tower", stream=True)
    assert "".join(chunk.choices[0].text for chunk in [*chunks, last]) == " is tall."
    assert last.choices[0].finish_reason == "stop" and list(last.hcache) == _HCACHE


def test_the_wire_is_what_openai_sends(http, service, tokenizer):
    _says(service, tokenizer, "Hello")
    body = {"messages": _ASK, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] for event in events[:-2])


def test_characters_split_over_tokens(client, service, tokenizer):
    text = "Zürich €5 🦊🙂 日本語 e\u0301"
    ids = _bytes_of(tokenizer, text)
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    service.script = lambda request: [*ids, 2]
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(model=_MODEL, messages=_ASK, stream=True)
    ]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_an_answer_that_ends_within_a_character(client, service, tokenizer):
    ids = _bytes_of(tokenizer, "a€")[:-1]
    service.script = lambda request: [*ids, 2]
    whole = client.chat.completions.create(model=_MODEL, messages=_ASK).choices[0].message.content
    chunks = client.chat.completions.create(model=_MODEL, messages=_ASK, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole == "a\ufffd"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_list_of_stop_strings(client, service, tokenizer, stream):
    ids = _bytes_of(tokenizer, "one two thr🦊 END of story")
    service.script = lambda request: [*ids, 2]
    stops = ["three", "🦊🦊", "EN of", "END of", "story", "d of s"]
    arguments = {"model": _MODEL, "messages": _ASK, "stop": stops}
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
    service.script = lambda request: _bytes_of(tokenizer, "ab")
    reply = client.completions.create(model=_MODEL, prompt="x", stop="b", max_tokens=2)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("a", "stop")


def test_many_at_once(client, service):
    service.step_s = 0.001

    def ask(seed):
        arguments = {"model": _MODEL, "messages": _ASK, "seed": seed, "max_tokens": 100}
        if seed % 2:
            return client.chat.completions.create(**arguments).choices[0].message.content
        chunks = client.chat.completions.create(**arguments, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == [ask(seed) for seed in range(16)]


# --- clients that leave, engines that fail, servers that stop ------------------------------------------------------


def test_a_stream_that_is_closed_is_cancelled_and_remembered(client, service, known):
    service.step_s = 0.01
    stream = client.chat.completions.create(
        model=_MODEL, messages=_ASK, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    seen = ""
    for chunk in stream:
        seen += chunk.choices[0].delta.content or ""
        if len(seen) > 40:
            break
    stream.close()
    wait_until(lambda: service.cancelled)
    wait_until(lambda: service.finished)
    assert len(service.finished[0].token_ids) < 400
    wait_until(lambda: known.texts)
    ((_, text),) = known.texts
    assert seen in text  # what the client saw, and perhaps what was on its way to it


def test_a_whole_reply_that_nobody_waits_for_is_cancelled(http, service):
    service.step_s = 0.01
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 400, "ignore_eos": True}, timeout=0.2)
    wait_until(lambda: service.cancelled)
    wait_until(lambda: service.finished)
    assert len(service.finished[0].token_ids) < 400


def test_nothing_is_cancelled_that_was_finished(client, service):
    client.chat.completions.create(model=_MODEL, messages=_ASK, max_tokens=5)
    list(client.chat.completions.create(model=_MODEL, messages=_ASK, max_tokens=5, stream=True))
    assert service.cancelled == []


def test_a_broken_engine_is_a_server_error(client, service):
    service.fail_after = 3
    with pytest.raises(openai.InternalServerError, match="the fake engine broke") as caught:
        client.chat.completions.create(model=_MODEL, messages=_ASK)
    assert caught.value.status_code == 500 and caught.value.type == "server_error"


def test_an_engine_that_breaks_in_a_stream_is_an_error_event(client, service):
    service.fail_after = 3
    chunks = []
    with pytest.raises(openai.APIError, match="the fake engine broke"):
        for chunk in client.chat.completions.create(model=_MODEL, messages=_ASK, stream=True):
            chunks.append(chunk)
    assert chunks


def test_a_failure_of_ours_in_the_engine_thread_ends_that_answer_only(client, service, monkeypatch):
    monkeypatch.setattr("mii_hcache.serve.answer.AnswerText.push", lambda self, token_id: 1 / 0)
    for stream in (True, False):
        with pytest.raises(openai.APIError, match="Internal server error"):
            list(client.chat.completions.create(model=_MODEL, messages=_ASK, stream=stream))
    monkeypatch.undo()
    assert client.chat.completions.create(model=_MODEL, messages=_ASK).choices[0].message.content


def test_transcripts_that_fail_cost_no_answer(client, known, monkeypatch):
    monkeypatch.setattr(known, "remember", lambda *args: 1 / 0)
    assert client.chat.completions.create(model=_MODEL, messages=_ASK).choices[0].message.content


def test_draining_refuses_new_work_and_finishes_what_runs(live, client, http, service):
    service.step_s = 0.005
    stream = client.chat.completions.create(
        model=_MODEL, messages=_ASK, max_tokens=100, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    live[0].state.answering.draining = True
    assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (503, "draining")
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=_MODEL, messages=_ASK)
    assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
    assert list(stream)[-1].choices[0].finish_reason == "length"


# --- errors of requests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", None]}, "stop"),
        ({"stop": ["x" * 70_000]}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"extra_body": {"min_tokens": 5}}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
    ],
)
def test_a_bad_request_names_its_field(client, service, arguments, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": _MODEL, "messages": _ASK, **arguments})
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert service.submitted == []


@pytest.mark.parametrize("prompt", [5, [], [[]], ["a", 5], [1, True], [1.5], None])
def test_a_bad_prompt(client, prompt):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=_MODEL, prompt=prompt)
    assert caught.value.param == "prompt"


def test_neutral_values_and_unknown_fields_are_accepted(client):
    client.chat.completions.create(
        model=_MODEL, messages=_ASK, max_tokens=1, n=1, presence_penalty=0.0, logit_bias={}, tools=[], user="me",
        response_format={"type": "text"}, stop=[""], top_logprobs=0, extra_body={"whatever": {"x": 1}, "min_tokens": 0},
    )  # fmt: skip


@pytest.mark.parametrize("prompt", [[2048], [-1], [10**30]])
def test_a_token_id_out_of_range(client, prompt):
    with pytest.raises(openai.BadRequestError, match="token ids must be in"):
        client.completions.create(model=_MODEL, prompt=prompt)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "message"),
    [
        (512, None, "maximum context length is 512 tokens.*resulted in 512 tokens"),
        (600, 1, "requested 601 tokens"),
        (500, 13, r"requested 513 tokens \(500 in the prompt, 13 in the completion\)"),
    ],
)
def test_too_long(client, num_prompt_tokens, max_tokens, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.completions.create(model=_MODEL, prompt=[5] * num_prompt_tokens, max_tokens=max_tokens)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_a_chat_that_is_too_long(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=_MODEL, messages=[{"role": "user", "content": "tower " * 2000}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_exactly_what_fits(client):
    reply = client.completions.create(model=_MODEL, prompt=[5] * 500, max_tokens=12, extra_body={"ignore_eos": True})
    assert reply.usage.total_tokens == 512


def test_one_bad_prompt_of_several_refuses_all(client, service):
    def script(request):
        if request.prompt_token_ids == [7]:
            raise RequestError("not this one", param="prompt")
        return tokens_for(request)

    service.script, service.step_s = script, 0.01
    with pytest.raises(openai.BadRequestError, match="not this one"):
        client.completions.create(model=_MODEL, prompt=[[5], [6], [7]], max_tokens=400)
    wait_until(lambda: len(service.finished) == 2)
    assert len(service.cancelled) == 2  # those before it were handed to the engine and taken back


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match=r"`gpt-4` does not exist.*serves `demo/model`") as caught:
        client.chat.completions.create(model="gpt-4", messages=_ASK)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b'{"messages": [', {}, 400, "invalid_json"),
        (b"", {}, 400, "invalid_json"),
        (b'{"messages": "\\ud800"}', {}, 400, "invalid_json"),
        (b"\xff\xfe\x00", {}, 400, "invalid_json"),
        (b"[]", {}, 400, "invalid_value"),
        (b"{}", {}, 400, "missing_required_parameter"),
        (b"[" * 10_000, {}, 400, "invalid_json"),
        (b"{}", {"content-type": "text/plain"}, 400, "invalid_content_type"),
        (b'{"messages": "' + b"x" * 100_000 + b'"}', {}, 413, "request_too_large"),
    ],
)
def test_a_broken_body(http, content, headers, status, code):
    headers = {"content-type": "application/json", **headers}
    response = http.post("/v1/chat/completions", content=content, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")


def test_a_body_without_a_length_is_limited_too(http):
    response = http.post(
        "/v1/completions", content=(b"x" * 10_000 for _ in range(11)), headers={"content-type": "application/json"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_a_body_that_is_announced_too_large_is_refused_unread(live):
    url = httpx.URL(live[3])
    with socket.create_connection((url.host, url.port), timeout=5) as sock:
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 999999"]
        sock.sendall("\r\n".join([*head, "", ""]).encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/completions", 405)])
def test_routes_that_are_not_there(http, method, path, status):
    response = http.request(method, path)
    assert response.status_code == status and response.json()["error"]["type"] == "invalid_request_error"


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-10, 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = ["prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "stream", "role",
           "content", "stream_options", "cache_salt", "n", "stop_token_ids", "ignore_eos", "min_tokens"]  # fmt: skip


@given(
    body=st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=4),
    message=st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), _JSON, max_size=3),
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
)
@settings(max_examples=150, deadline=None)
def test_no_body_breaks_the_server(live, body, message, path):
    live[1].reset()
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x", **message}], "max_tokens": 2, **body}
    response = httpx.post(live[3] + path, json=body, timeout=10)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    else:
        assert "error" not in response.text.partition("data: ")[0]


# --- the other routes ----------------------------------------------------------------------------------------------


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == (_MODEL, "model", 512)
    assert client.models.retrieve(_MODEL).id == _MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_health(http):
    response = http.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "model": _MODEL, "max_context_tokens": 512}


def test_the_schema_describes_the_bodies(http):
    paths = http.get("/openapi.json").json()["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "max_tokens", "stop"} <= set(schema["properties"]) and "$ref" not in json.dumps(schema)


def _samples(http):
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_metrics(http, client, service):
    before = _samples(http)
    service.restored_from = "memory"
    reply = client.chat.completions.create(model=_MODEL, messages=_ASK, max_tokens=30)
    client.chat.completions.create(model=_MODEL, messages=_ASK, max_tokens=30)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=_MODEL, messages=[])
    after = _samples(http)

    def grew(*key):
        return after[key] - before.get(key, 0)

    prompt_tokens = reply.usage.prompt_tokens
    assert after["mii_hcache_steps_total",] == 7 and after["mii_hcache_free_blocks",] == 3
    assert grew("mii_hcache_http_prompt_tokens_total", "prefilled") == prompt_tokens + 1
    assert grew("mii_hcache_http_prompt_tokens_total", "restored") == prompt_tokens - 1
    assert grew("mii_hcache_http_prompt_tokens_total", "resident") == 0
    assert grew("mii_hcache_http_requests_total", "/v1/chat/completions", "200") == 2
    assert grew("mii_hcache_http_requests_total", "/v1/chat/completions", "400") == 1
    assert grew("mii_hcache_http_ttft_seconds_count") == 2
    assert grew("mii_hcache_http_request_seconds_count", "/v1/chat/completions") == 3


def test_the_event_loop_is_free_while_a_prompt_is_encoded(live, http, service, monkeypatch):
    """A long text takes a while to tokenise; other clients must not wait for it."""
    entered, leave = threading.Event(), threading.Event()

    def slow(self, text, **_):
        entered.set()
        assert leave.wait(5)
        raise openai.OpenAIError("never mind")

    monkeypatch.setattr("mii_hcache.serve.text.PromptEncoder.encode_text", slow)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, live[3] + "/v1/completions", json={"prompt": "x"})
        assert entered.wait(5)
        assert http.get("/health").status_code == 200
        leave.set()
        assert asked.result().status_code == 500
