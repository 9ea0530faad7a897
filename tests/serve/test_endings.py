"""Clients that leave, engines that fail, servers that stop."""

import httpx
import openai
import pytest
from serve_kit import ASK, MODEL, wait_until


def test_a_stream_that_is_closed_is_cancelled_and_remembered(client, service, known):
    service.step_s = 0.01
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
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
    client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5)
    list(client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5, stream=True))
    assert service.cancelled == []


def test_a_broken_engine_is_a_server_error(client, service):
    service.fail_after = 3
    with pytest.raises(openai.InternalServerError, match="the fake engine broke") as caught:
        client.chat.completions.create(model=MODEL, messages=ASK)
    assert caught.value.status_code == 500 and caught.value.type == "server_error"


def test_an_engine_that_breaks_in_a_stream_is_an_error_event(client, service):
    service.fail_after = 3
    chunks = []
    with pytest.raises(openai.APIError, match="the fake engine broke"):
        for chunk in client.chat.completions.create(model=MODEL, messages=ASK, stream=True):
            chunks.append(chunk)
    assert chunks


def test_a_failure_of_ours_in_the_engine_thread_ends_that_answer_only(client, service, monkeypatch):
    monkeypatch.setattr("mii_hcache.serve.answer.AnswerText.push", lambda self, token_id: 1 / 0)
    for stream in (True, False):
        with pytest.raises(openai.APIError, match="Internal server error"):
            list(client.chat.completions.create(model=MODEL, messages=ASK, stream=stream))
    monkeypatch.undo()
    assert client.chat.completions.create(model=MODEL, messages=ASK).choices[0].message.content


def test_transcripts_that_fail_cost_no_answer(client, known, monkeypatch):
    monkeypatch.setattr(known, "remember", lambda *args: 1 / 0)
    assert client.chat.completions.create(model=MODEL, messages=ASK).choices[0].message.content


def test_draining_refuses_new_work_and_finishes_what_runs(live, client, http, service):
    service.step_s = 0.005
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=100, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    live[0].state.answering.draining = True
    assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (503, "draining")
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK)
    assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
    assert list(stream)[-1].choices[0].finish_reason == "length"
