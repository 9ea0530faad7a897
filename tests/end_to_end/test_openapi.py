"""The API against its own description, and against prompts that nobody would write: no 500, no answer of another shape.

A server process with the demo model and short conversations.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.end_to_end.server_kit import Server, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (it needs Python 3.11)")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

MAX_CONTEXT_TOKENS = 192
VOCAB_SIZE = 2048
FIXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("api")
    with serving(root, "--max-context", str(MAX_CONTEXT_TOKENS), "--kv-blocks", "64", "--keep", "none") as server:
        yield server
        metrics = server.metrics()
        assert metrics["requests_length_total"] > 0
        assert not [name for name in metrics if "error" in name and metrics[name]]


@pytest.fixture(scope="module")
def api(server: Server):
    """The operations of the server's description."""
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


@pytest.mark.parametrize(
    ("method", "path", "mode", "num_examples"),
    [
        ("POST", "/v1/completions", "positive", 60),
        ("POST", "/v1/completions", "negative", 30),
        ("POST", "/v1/chat/completions", "positive", 60),
        ("POST", "/v1/chat/completions", "negative", 30),
        ("GET", "/v1/models/{model}", "positive", 10),
        ("GET", "/v1/models", "positive", 1),
        ("GET", "/health", "positive", 1),
        ("GET", "/metrics", "positive", 1),
    ],
)
def test_the_api_is_as_it_is_described(api, method, path, mode, num_examples):
    """Requests that fit the description are answered as it says; those that do not are refused as it says."""
    operation = api[path][method]
    statuses = []

    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    @seed(0)
    @settings(max_examples=num_examples, **FIXED)
    def check(case):
        if mode == "positive" and isinstance(case.body, dict):
            _make_sensible(case.body, may_be_long=len(statuses) < 10)
        statuses.append(case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance]).status_code)

    check()
    assert len(statuses) >= num_examples
    if mode == "positive" and method == "POST":
        assert statuses.count(200) > num_examples // 2, statuses


def _make_sensible(body: dict[str, Any], *, may_be_long: bool) -> None:
    """What a description cannot say: lengths that fit, fields that need each other, a name that few would guess."""
    if isinstance(body.get("model"), str):
        body["model"] = "mii-hcache-demo"
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int):
            body[name] %= 50
    if "messages" in body and body.get("max_tokens") is None and not may_be_long:
        body["max_tokens"] = 5  # else answers fill the context
    if "prompt" in body:
        body["prompt"] = _in_vocabulary(body["prompt"])
    for name, needed in (("stream_options", "stream"), ("top_logprobs", "logprobs"), ("min_tokens", "ignore_eos")):
        if not body.get(needed):
            body.pop(name, None)


def _in_vocabulary(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_vocabulary(item) for item in value]
    return value if isinstance(value, str) else int(value) % VOCAB_SIZE


# --- prompts --------------------------------------------------------------------------------------------------------

_TEXT = st.text(max_size=120)
_SPECIAL = st.lists(
    st.sampled_from(["<s>", "</s>", "<|user|>\n", "<|assistant|>", "\0", "\ufffd", "\u200d", "🙂", " "])
)
_PROMPT = st.one_of(
    _TEXT,
    _SPECIAL.map("".join),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=150),
    st.lists(_TEXT, min_size=1, max_size=4),
)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": _TEXT | _SPECIAL.map("".join)}
)
_BODY = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 40),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(-1, 3000),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
        "stream": st.booleans(),
        "ignore_eos": st.booleans(),
        "logprobs": st.booleans(),
        "cache_salt": st.text(max_size=5),
    },
)


@given(prompt=_PROMPT, body=_BODY, echo=st.booleans())
@seed(0)
@settings(max_examples=60, **FIXED)
def test_any_prompt_is_answered(server, prompt, body, echo):
    body = {**body, "prompt": prompt, "echo": echo, "logprobs": 3 if body.get("logprobs") else None}
    _ask(server, "/v1/completions", body)


@given(messages=st.lists(_MESSAGE, min_size=1, max_size=4), body=_BODY)
@seed(0)
@settings(max_examples=60, **FIXED)
def test_any_chat_is_answered(server, messages, body):
    few = {"max_tokens": 5}  # else most answers would fill the context
    _ask(server, "/v1/chat/completions", {**few, **body, "messages": messages})


def _ask(server: Server, path: str, body: dict[str, Any]) -> None:
    response = server.http.post(path, json=body)
    if response.status_code == 400:
        error = response.json()["error"]  # a text may be longer than the context, a prompt without a token
        assert error["code"] == "context_length_exceeded" or "no tokens" in error["message"], error
        return
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        assert all(choice["finish_reason"] in ("stop", "length") for choice in response.json()["choices"])
        return
    *events, last = response.text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    assert not [event for event in events if "error" in json.loads(event.removeprefix("data: "))]


def test_lone_surrogates_are_refused(server):
    """They are no text, though JSON can write them."""
    for body in (b'{"prompt": "\\ud800"}', b'{"prompt": "x", "stop": "\\udc00", "max_tokens": 1}'):
        response = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
