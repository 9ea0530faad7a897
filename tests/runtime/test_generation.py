"""What servers and engines tell each other is checked when it is made."""

from __future__ import annotations

import json
import math

import pytest

from mii_hcache.errors import ConfigError
from mii_hcache.runtime.generation import FinishReason, GenerationRequest, RestoreReport, SamplingParams


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
    ],
)
def test_sampling_that_cannot_be_is_refused_by_name(name, bad):
    with pytest.raises(ConfigError, match=rf"{name} must be .*got {bad}"):
        SamplingParams(**{"max_new_tokens": 1, name: bad})


def test_the_edges_of_sampling_are_allowed():
    params = SamplingParams(max_new_tokens=1, temperature=0, top_p=1.0, top_k=0)
    assert params.stop_token_ids == frozenset() and params.seed is None


def test_a_report_is_json_in_milliseconds():
    report = RestoreReport(
        resident_tokens=64, restored_tokens=128, restored_from="memory", method="hidden", restore_ms=1.23456, ttft_ms=7
    )
    assert report.cached_tokens == 192
    values = json.loads(json.dumps(report.to_dict()))
    assert values.items() >= {"resident_tokens": 64, "restored_tokens": 128, "method": "hidden"}.items()
    assert values.items() >= {"restore_ms": 1.235, "ttft_ms": 7, "miss_reason": None}.items()
    assert RestoreReport().to_dict()["ttft_ms"] is None


def test_a_request_ignores_its_tokens_unless_told_otherwise():
    request = GenerationRequest(
        request_id="1",
        prompt_token_ids=[1],
        sampling=SamplingParams(max_new_tokens=1),
        on_finish=lambda result: None,
    )
    assert request.on_token(5) is False
    assert (request.tenant_salt, request.miss_hint) == (b"", None)


def test_finish_reasons_are_their_words():
    assert [reason.value for reason in FinishReason] == ["stop", "length", "cancelled", "error"]
