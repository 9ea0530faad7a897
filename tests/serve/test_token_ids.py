"""`return_token_ids`: which tokens went in and came out, whole and streamed, in vLLM's places."""

import json

import pytest
from serve_kit import ASK, MODEL, bytes_of

BODIES = {
    "/v1/completions": {"prompt": [5, 300, 301], "max_tokens": 40},
    "/v1/chat/completions": {"messages": ASK, "max_tokens": 40},
}


def _chunks(http, path, body):
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("ending", ["length", "end token", "stop string"])
def test_whole_and_streamed(http, service, tokenizer, path, ending):
    generated = bytes_of(tokenizer, "Zürich €5 🦊 in the north")
    if ending == "end token":
        generated = [*generated[:20], 2]
    service.script = lambda request: generated
    body = {**BODIES[path], "return_token_ids": True, "max_tokens": len(generated)}
    if ending == "stop string":
        body["stop"] = ["the"]
    whole = http.post(path, json=body).json()
    (choice,) = whole["choices"]
    assert choice["token_ids"] == list(service.finished[0].token_ids)
    assert len(choice["token_ids"]) == whole["usage"]["completion_tokens"]
    prompt = list(service.submitted[0].prompt_token_ids)
    first, *others = _chunks(http, path, body)
    for reply, its_choice in ((whole, choice), (first, first["choices"][0])):
        where, elsewhere = (reply, its_choice) if "chat" in path else (its_choice, reply)
        assert where["prompt_token_ids"] == prompt and "prompt_token_ids" not in elsewhere
    pieces = [one["choices"][0].get("token_ids", []) for one in others]
    assert [token_id for piece in pieces for token_id in piece] == choice["token_ids"]
    assert max(map(len, pieces)) == 1  # each as soon as it is there, also within a character
    text = "".join(
        one["choices"][0].get("text") or one["choices"][0].get("delta", {}).get("content", "") for one in others
    )
    assert text == choice.get("text", choice.get("message", {}).get("content"))


def test_a_prompt_that_is_only_scored_has_no_answer(http, service):
    body = {"prompt": [5, 300], "max_tokens": 0, "echo": True, "logprobs": 0, "return_token_ids": True}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([], [5, 300])


def test_each_of_several_prompts_has_its_own(http, service):
    body = {"model": MODEL, "prompt": [[5, 300], [7, 301, 302]], "max_tokens": 6, "return_token_ids": True}
    for prompt, choice in zip(body["prompt"], http.post("/v1/completions", json=body).json()["choices"], strict=True):
        assert choice["prompt_token_ids"] == prompt
    told = {0: [], 1: []}
    for chunk in _chunks(http, "/v1/completions", body):
        for choice in chunk["choices"]:
            told[choice["index"]] += choice.get("token_ids", [])
    by_prompt = {tuple(request.prompt_token_ids): service.script(request) for request in service.submitted}
    for idx, prompt in enumerate(body["prompt"]):
        whole = by_prompt[tuple(prompt)]
        assert told[idx] == whole[: whole.index(2) + 1 if 2 in whole else 6]


@pytest.mark.parametrize("asked", [None, False])
def test_nobody_is_told_unasked(http, service, asked):
    body = {"prompt": [5, 300], "max_tokens": 5, "return_token_ids": asked}
    reply = http.post("/v1/completions", json=body)
    assert "token_ids" not in reply.text
    assert "token_ids" not in json.dumps(_chunks(http, "/v1/completions", body))
