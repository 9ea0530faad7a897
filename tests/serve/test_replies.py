"""Whole replies through OpenAI's own client, over loopback, with an engine whose answers the test chooses."""

import pytest
from serve_kit import ASK, HCACHE_FIELDS, MODEL, says


def test_a_chat_answer(client, service, tokenizer):
    ids = says(service, tokenizer, "It is a tall tower.")
    reply = client.chat.completions.create(model=MODEL, messages=ASK)
    assert reply.object == "chat.completion" and reply.model == MODEL and reply.id.startswith("chatcmpl-")
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "It is a tall tower.")
    assert (choice.index, choice.finish_reason) == (0, "stop")
    prompt = tokenizer.encode(tokenizer.render_chat(ASK, add_generation_prompt=True), add_special_tokens=False)
    assert service.submitted[0].prompt_token_ids == prompt
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == len(ids) + 1
    assert reply.usage.total_tokens == len(prompt) + len(ids) + 1
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    assert list(reply.hcache) == HCACHE_FIELDS
    assert reply.hcache["prefill_tokens"] == len(prompt) and reply.hcache["ttft_ms"] > 0


def test_a_second_turn_is_cached_to_the_end_of_the_first_answer(client, service):
    messages = list(ASK)
    first = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=60, extra_body={"ignore_eos": True}
    )
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "And then?"})
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    assert second.hcache["resident_tokens"] == first.usage.prompt_tokens + 60
    assert second.usage.prompt_tokens_details.cached_tokens == second.hcache["resident_tokens"]
    assert second.hcache["prefill_tokens"] == second.usage.prompt_tokens - second.hcache["resident_tokens"]
    assert second.hcache["miss_reason"] is None


def test_restored_tokens_are_reported(client, service):
    client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5)
    service.restored_from = "file"
    reply = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5)
    num_tokens = reply.usage.prompt_tokens
    ttft_ms = reply.hcache.pop("ttft_ms")
    assert ttft_ms == round(ttft_ms, 3)
    assert reply.hcache == {
        "resident_tokens": 0,
        "restored_tokens": num_tokens - 1,
        "recomputed_tokens": 0,
        "restored_from": "file",
        "method": "hidden",
        "restore_ms": 1.235,
        "planned_ms": None,
        "prefill_tokens": 1,
        "miss_reason": None,
    }
    assert reply.usage.prompt_tokens_details.cached_tokens == num_tokens - 1


def test_an_edited_history_is_reported(client):
    messages = [*ASK, {"role": "assistant", "content": "Never said."}, {"role": "user", "content": "What?"}]
    reply = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    assert reply.hcache["miss_reason"] == "text_changed"


def test_cache_salt_separates_tenants(client, service):
    for salt, cached in ((None, False), (None, True), ("a", False), ("a", True), ("b", False)):
        body = {} if salt is None else {"cache_salt": salt}
        reply = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5, extra_body=body)
        assert (reply.hcache["resident_tokens"] > 0) == cached
    assert [request.tenant_salt for request in service.submitted] == [b"", b"", b"a", b"a", b"b"]


def test_content_parts_and_developer_messages(client, service, tokenizer):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
    ]
    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    text = "<s><|system|>\nBe brief.</s>\n<|user|>\nOne.\nTwo.</s>\n<|assistant|>\n"
    assert service.submitted[0].prompt_token_ids == tokenizer.encode(text, add_special_tokens=False)


def test_a_completion_of_text(client, service, tokenizer):
    says(service, tokenizer, " is tall.")
    reply = client.completions.create(model=MODEL, prompt="The tower")
    assert reply.object == "text_completion" and reply.choices[0].text == " is tall."
    assert service.submitted[0].prompt_token_ids == tokenizer.encode("The tower", add_special_tokens=True)
    again = client.completions.create(model=MODEL, prompt="The tower is tall. And")
    assert again.hcache["resident_tokens"] == reply.usage.prompt_tokens + reply.usage.completion_tokens - 1


def test_token_ids_are_taken_as_they_are(client, service):
    reply = client.completions.create(model=MODEL, prompt=[1, 999, 7, 7, 1500], max_tokens=3)
    assert service.submitted[0].prompt_token_ids == [1, 999, 7, 7, 1500]
    assert reply.usage.prompt_tokens == 5


@pytest.mark.parametrize("prompts", [["One", "Two", "Three"], [[5, 6], [7, 8, 9], [10]]], ids=["texts", "ids"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_several_prompts_are_several_choices(client, service, tokenizer, prompts, stream):
    arguments = {"model": MODEL, "prompt": prompts, "max_tokens": 20}
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
    client.completions.create(model=MODEL, prompt=[5] * 10, extra_body={"ignore_eos": True})
    client.completions.create(model=MODEL, prompt=[5] * 510, extra_body={"ignore_eos": True})
    client.chat.completions.create(model=MODEL, messages=ASK)
    client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=9, max_completion_tokens=8)
    lengths = [request.sampling.max_new_tokens for request in service.submitted]
    assert lengths == [16, 2, 512 - len(service.submitted[2].prompt_token_ids), 8]


def test_sampling_settings_reach_the_engine(client, service, tokenizer):
    client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        temperature=0.5,
        top_p=0.9,
        seed=-7,
        extra_body={"top_k": 40, "stop_token_ids": [9]},
    )
    client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=3, extra_body={"top_k": -1, "ignore_eos": True}
    )
    one, two = (request.sampling for request in service.submitted)
    assert (one.temperature, one.top_p, one.top_k, one.seed) == (0.5, 0.9, 40, -7)
    assert one.stop_token_ids == {tokenizer.eos_token_id, 9}
    assert (two.temperature, two.top_p, two.top_k, two.seed) == (1.0, 1.0, 0, None)
    assert two.stop_token_ids == frozenset()


def test_sampling_settings_that_are_too_small_to_compute_with(client, service):
    """One such request would fail the step of all that run beside it."""
    for temperature, top_p in ((1e-310, 1.0), (1e-6, 5e-324), (1.0, 1e-300), (1e-5, 1e-6)):
        client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=1, temperature=temperature, top_p=top_p)
    settings = [(request.sampling.temperature, request.sampling.top_p) for request in service.submitted]
    assert settings == [(0.0, 1.0), (0.0, 1e-6), (1.0, 1e-6), (1e-5, 1e-6)]


def test_finish_reason_length(client, service, tokenizer):
    says(service, tokenizer, "one two three four five six seven eight")
    reply = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=3)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 3
