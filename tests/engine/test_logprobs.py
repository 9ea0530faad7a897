"""Logprobs of generated and of prompt tokens equal Hugging Face's; a full queue refuses."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from mii_hcache.errors import QueueFullError
from mii_hcache.runtime.generation import GenerationRequest, SamplingParams
from tests.engine_kit import VOCAB, open_client, poisoned_engine, tiny_hf_model


@pytest.mark.parametrize("num_prompt", [1, 2, 64, 300])
def test_prompt_and_generated_logprobs(tiny_model, num_prompt):
    client = open_client(poisoned_engine(tiny_model("llama-gqa"), max_batch_tokens=96), keep="lru")
    prompt = random.Random(num_prompt).choices(range(3, VOCAB), k=num_prompt)
    client.ask(prompt, 4)  # saved and resident by now: neither gives logits, so neither may be used
    prompt_logprobs, generated, results = [], [], []
    client.service.submit(
        GenerationRequest(
            request_id="logprobs",
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_new_tokens=5),
            on_finish=results.append,
            num_top_logprobs=3,
            on_logprob=generated.append,
            on_prompt_logprobs=prompt_logprobs.extend,
        )
    )
    client.ask(prompt[:1], 1)
    client.service.close()
    (result,) = results
    assert result.report.cached_tokens == 0
    assert result.report.miss_reason == "prompt_logprobs"
    assert [logprob.token_id for logprob in generated] == list(result.token_ids)
    told = [*prompt_logprobs, *generated]
    assert told[0] is None
    tokens = [*prompt, *result.token_ids]
    with torch.no_grad():
        expected = tiny_hf_model("llama-gqa")(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert len(told) == len(tokens)
    for position, logprob in enumerate(told[1:], start=1):
        row = expected[position - 1]
        assert logprob.token_id == tokens[position]
        assert logprob.logprob == pytest.approx(float(row[tokens[position]]), abs=2e-3)
        best = row.topk(3)
        assert [value for _, value in logprob.top] == pytest.approx(best.values.tolist(), abs=2e-3)


def test_a_full_queue_refuses_and_says_when_to_come_back(tiny_model):
    client = open_client(poisoned_engine(tiny_model("llama")), max_waiting=3, max_sequences=1)
    is_full = threading.Event()
    sent = [client.send([5, 6, 7], 20, on_token=lambda token_id: not is_full.wait(60))]
    with pytest.raises(QueueFullError, match="3 requests are waiting") as refusal:
        for _ in range(10):
            sent.append(client.send([5, 6, 7], 20))
    assert refusal.value.retry_after_s > 0
    is_full.set()
    for results in sent:
        assert len(results.get(timeout=60).token_ids) == 20
    assert client.service.metrics()["requests_refused_total"] == 1
    client.service.close()
