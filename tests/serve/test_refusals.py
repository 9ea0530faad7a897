"""Requests that are refused: with OpenAI's status, shape and the name of the field."""

import socket
import time

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_kit import ASK, MODEL, tokens_for, wait_until

from mii_hcache.errors import QueueFullError, RequestError


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
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"extra_body": {"echo": True}}, "echo"),
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
        client.chat.completions.create(**{"model": MODEL, "messages": ASK, **arguments})
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert service.submitted == []


@pytest.mark.parametrize("prompt", [5, [], [[]], ["a", 5], [1, True], [1.5], None])
def test_a_bad_prompt(client, prompt):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=prompt)
    assert caught.value.param == "prompt"


def test_neutral_values_and_unknown_fields_are_accepted(client):
    client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=1, n=1, presence_penalty=0.0, logit_bias={}, tools=[], user="me",
        response_format={"type": "text"}, stop=[""], top_logprobs=0, extra_body={"whatever": {"x": 1}, "min_tokens": 0},
    )  # fmt: skip


@pytest.mark.parametrize("prompt", [[2048], [-1], [10**30]])
def test_a_token_id_out_of_range(client, prompt):
    with pytest.raises(openai.BadRequestError, match="token ids must be in"):
        client.completions.create(model=MODEL, prompt=prompt)


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
        client.completions.create(model=MODEL, prompt=[5] * num_prompt_tokens, max_tokens=max_tokens)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_a_chat_that_is_too_long(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "tower " * 2000}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_exactly_what_fits(client):
    reply = client.completions.create(model=MODEL, prompt=[5] * 500, max_tokens=12, extra_body={"ignore_eos": True})
    assert reply.usage.total_tokens == 512


def test_one_bad_prompt_of_several_refuses_all(client, service):
    def script(request):
        if request.prompt_token_ids == [7]:
            raise RequestError("not this one", param="prompt")
        return tokens_for(request)

    service.script, service.step_s = script, 0.01
    with pytest.raises(openai.BadRequestError, match="not this one"):
        client.completions.create(model=MODEL, prompt=[[5], [6], [7]], max_tokens=400)
    wait_until(lambda: len(service.finished) == 2)
    assert len(service.cancelled) == 2  # those before it were handed to the engine and taken back


def _too_many(retry_after_s):
    raise QueueFullError("3 requests are waiting, which is the most; try again later", retry_after_s=retry_after_s)


@pytest.mark.parametrize(("retry_after_s", "header"), [(0.0, "1"), (0.2, "1"), (2.0, "2"), (2.1, "3")])
def test_a_full_queue_says_when_to_come_back(client, service, retry_after_s, header):
    service.refuse = lambda: _too_many(retry_after_s)
    with pytest.raises(openai.RateLimitError, match="3 requests are waiting") as caught:
        client.chat.completions.create(model=MODEL, messages=ASK)
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert caught.value.response.headers["retry-after"] == header


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openais_client_comes_back(live, service, stream):
    refusals = [0.1]
    service.refuse = lambda: _too_many(refusals.pop()) if refusals else None
    with openai.OpenAI(base_url=live[3] + "/v1", api_key="none", max_retries=1, timeout=30) as client:
        begin = time.monotonic()
        reply = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=3, stream=stream)
        assert list(reply) if stream else reply.choices
    assert time.monotonic() - begin > 0.9  # it waited as it was told, not as it would by itself
    assert len(service.submitted) == 1


def test_prompts_of_a_batch_that_found_no_place_take_the_others_back(client, service):
    service.refuse = lambda: _too_many(1) if len(service.submitted) == 2 else None
    service.step_s = 0.01
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt=[[5], [6], [7]], max_tokens=400)
    wait_until(lambda: len(service.finished) == 2)
    assert len(service.cancelled) == 2


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match=r"`gpt-4` does not exist.*serves `demo/model`") as caught:
        client.chat.completions.create(model="gpt-4", messages=ASK)
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
    with socket.create_connection((url.host, url.port), timeout=30) as sock:
        head = [
            "POST /v1/completions HTTP/1.1",
            "Host: 127.0.0.1",
            "Content-Type: application/json",
            "Content-Length: 999999",
        ]
        sock.sendall("\r\n".join([*head, "", ""]).encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/completions", 405)])
def test_routes_that_are_not_there(http, method, path, status):
    response = http.request(method, path)
    error = response.json()["error"]
    assert response.status_code == status and error["type"] == "invalid_request_error"
    if status == 404:
        assert error["code"] == "not_found"
        assert "/nothing" in error["message"] and "/v1/chat/completions, " in error["message"]


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
@settings(max_examples=80, deadline=None)
def test_no_body_breaks_the_server(live, body, message, path):
    live[1].reset()
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x", **message}], "max_tokens": 2, **body}
    response = httpx.post(live[3] + path, json=body, timeout=30)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    else:
        assert "error" not in response.text.partition("data: ")[0]
