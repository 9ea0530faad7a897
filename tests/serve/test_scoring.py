"""What evaluation harnesses do: score continuations through /v1/completions of the real engine, as lm-eval does with
`local-completions`, against plain transformers."""

import random

import openai
import pytest
from serve_kit import live_server

CONTEXT = "The lighthouse keeper climbs the stairs and"
CONTINUATIONS = (" lights the lamp.", " sleeps.", " 水 🙂", " the the the")


@pytest.fixture(scope="module")
def server(tmp_path_factory, demo_path):
    """A client of a server over the demo model, and the tokenizer."""
    pytest.importorskip("deepspeed")
    from mii_hcache.config import HCacheConfig
    from mii_hcache.engine.open import open_service
    from mii_hcache.serve.app import create_app

    opened = open_service(
        HCacheConfig(model=str(demo_path), state_dir=str(tmp_path_factory.mktemp("state")), kv_blocks=400)
    )
    app = create_app(opened.service, opened.tokenizer, opened.transcripts, opened.model_name)
    with (
        live_server(app) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client, opened.tokenizer, opened.model_name
    opened.close()


@pytest.fixture(scope="module")
def reference(demo_path):
    """Logprobs of every next token, `[num_tokens, vocab_size]`, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.float32).eval()

    def logprobs(token_ids):
        with torch.no_grad():
            return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    return logprobs


def _greedy(reference, token_ids, num_tokens):
    token_ids = list(token_ids)
    for _ in range(num_tokens):
        token_ids.append(int(reference(token_ids)[-1].argmax()))
    return token_ids[-num_tokens:]


def _parse(choice, num_context, max_tokens):
    """lm-eval's `parse_logprobs`: log-likelihood of the continuation, and whether greedy decoding would say it."""
    stop = -1 if max_tokens else None  # the generated token is not part of it
    told = choice.logprobs.token_logprobs[num_context:stop]
    tops = choice.logprobs.top_logprobs[num_context:stop]
    return sum(told), all(logprob == max(top.values()) for logprob, top in zip(told, tops, strict=True))


@pytest.mark.parametrize("max_tokens", [1, 0])
def test_loglikelihood_of_continuations(server, reference, max_tokens):
    client, tokenizer, model = server
    context = tokenizer.encode(CONTEXT, add_special_tokens=True)
    continuations = [tokenizer.encode_continuation(text) for text in CONTINUATIONS]
    continuations.append(_greedy(reference, context, 6))
    reply = client.completions.create(
        model=model,
        prompt=[context + continuation for continuation in continuations],
        temperature=0,
        max_tokens=max_tokens,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    assert [choice.index for choice in reply.choices] == list(range(len(continuations)))
    for choice, continuation in zip(reply.choices, continuations, strict=True):
        token_ids = context + continuation
        rows = reference(token_ids)[len(context) - 1 : -1]
        expected = float(rows.gather(-1, rows.new_tensor(continuation).long()[:, None]).sum())
        loglikelihood, is_greedy = _parse(choice, len(context), max_tokens)
        assert loglikelihood == pytest.approx(expected, abs=2e-3)
        assert is_greedy == (rows.argmax(-1).tolist() == continuation)
        assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
        assert len(choice.logprobs.tokens) == len(token_ids) + max_tokens
    assert [_parse(choice, len(context), max_tokens)[1] for choice in reply.choices] == [False] * 4 + [True]


def test_perplexity_of_a_long_text(server, reference):
    """Longer than an engine step, and told again although its state is saved by then."""
    client, _, model = server
    prompt = [1, *random.Random(0).choices(range(6, 2048), k=900)]
    expected = reference(prompt)[:-1].gather(-1, reference(prompt).new_tensor(prompt[1:]).long()[:, None])[:, 0]
    for _ in range(2):
        reply = client.completions.create(model=model, prompt=prompt, max_tokens=0, logprobs=0, echo=True)
        told = reply.choices[0].logprobs.token_logprobs
        assert told[1:] == pytest.approx(expected.tolist(), abs=2e-3)
        assert reply.usage.completion_tokens == 0 and reply.usage.prompt_tokens_details.cached_tokens == 0


def test_logprobs_of_an_answer(server, reference):
    client, tokenizer, model = server
    messages = [{"role": "user", "content": "Tell me about lighthouses."}]
    chunks = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=30, logprobs=True, top_logprobs=5, stream=True
    )
    content = [entry for chunk in chunks if (told := chunk.choices[0].logprobs) for entry in told.content]
    prompt = tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True), add_special_tokens=False)
    answer = _greedy(reference, prompt, len(content))
    best = reference(prompt + answer)[len(prompt) - 1 : -1].topk(5).values
    assert len(content) >= 10
    for entry, row in zip(content, best.tolist(), strict=True):
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(row, abs=2e-3)
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
