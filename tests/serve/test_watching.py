"""The routes that watch: models, health, metrics."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_kit import ASK, MODEL


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == (MODEL, "model", 512)
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_health(http):
    response = http.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "model": MODEL, "max_context_tokens": 512}


def test_a_dead_engine_is_noticed(http, client, service):
    service.is_alive = False
    response = http.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "failed")
    with pytest.raises(openai.InternalServerError, match="engine has failed") as caught:
        client.chat.completions.create(model=MODEL, messages=ASK)
    assert caught.value.status_code == 503


def test_the_ranks_of_a_model_over_several_processes_are_named(http, service):
    service.rank_states = {0: "ready", 1: "gone"}
    service.is_alive = False
    response = http.get("/health")
    assert response.status_code == 503
    assert (response.json()["status"], response.json()["ranks"]) == ("failed", {"0": "ready", "1": "gone"})
    del service.rank_states


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
    reply = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=30)
    client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=30)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[])
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
        assert leave.wait(60)  # longer than clients wait
        raise openai.OpenAIError("never mind")

    monkeypatch.setattr("mii_hcache.serve.text.PromptEncoder.encode_text", slow)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, live[3] + "/v1/completions", json={"prompt": "x"}, timeout=90)
        assert entered.wait(30)
        assert http.get("/health").status_code == 200
        leave.set()
        assert asked.result().status_code == 500
