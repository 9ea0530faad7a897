"""`mii_hcache.pipeline`: MII's call and answer, over the real engine and over a service that says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mii_hcache
from mii_hcache.engine.demo_model import ensure_demo_model
from mii_hcache.engine.pipeline import Pipeline, Response
from mii_hcache.engine.tokenizer import Tokenizer
from mii_hcache.errors import ConfigError, HCacheError, RequestError
from mii_hcache.runtime.generation import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    RestoreReport,
    SamplingParams,
)
from mii_hcache.storage.transcripts import Transcripts

STORY = "The sailor remembers the lighthouse. " * 12
SETTINGS: dict[str, Any] = {
    "method": "hidden",
    "dtype": "float32",
    "kv_blocks": 200,
    "keep": "none",
    "dram_capacity_bytes": 32 << 20,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def demo_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def pipe(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with mii_hcache.pipeline(demo_path, state_dir=str(tmp_path_factory.mktemp("state")), **SETTINGS) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(demo_path: Path) -> Tokenizer:
    return Tokenizer(demo_path)


class EchoService:
    """Answers when `num_awaited` requests are there: each says its `script`'s tokens, one by one."""

    vocab_size = 2048
    max_context_tokens = 100

    def __init__(self, script: list[int], *, num_awaited: int = 1, error: HCacheError | None = None) -> None:
        self.script = script
        self.num_awaited = num_awaited
        self.error = error
        self.requests: list[GenerationRequest] = []
        self._waiting: list[GenerationRequest] = []
        self.cancelled: list[str] = []

    def submit(self, request: GenerationRequest) -> None:
        if not request.prompt_token_ids:
            raise RequestError("the prompt has no tokens")
        self.requests.append(request)
        self._waiting.append(request)
        if len(self._waiting) == self.num_awaited:
            waiting, self._waiting = self._waiting, []
            for answered in waiting:
                answered.on_finish(self._run(answered))

    def _run(self, request: GenerationRequest) -> GenerationResult:
        told: list[int] = []
        reason = FinishReason.LENGTH
        for token_id in self.script[: request.sampling.max_new_tokens]:
            told.append(token_id)
            if request.on_token(token_id) or token_id in request.sampling.stop_token_ids:
                reason = FinishReason.STOP
                break
        error = self.error if request is self.requests[-1] else None
        return GenerationResult(finish_reason=reason, token_ids=tuple(told), report=RestoreReport(), error=error)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


class SpaceDropping:
    """A tokenizer whose texts lose the space that they begin with, as Llama 2's do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids).removeprefix(" ")

    def fingerprint(self) -> bytes:
        return b"another"


def pipeline_over(service: EchoService, tokenizer: Any, transcripts: Transcripts) -> Pipeline:
    opened: Any = SimpleNamespace(service=service, tokenizer=tokenizer, state=SimpleNamespace(transcripts=transcripts))
    return Pipeline(opened)


@pytest.fixture
def echo(tokenizer: Tokenizer) -> Callable[..., tuple[Pipeline, EchoService]]:
    """`echo(script, **options)`: a pipeline whose every answer is `script`, a text or token ids."""

    def opened(script: str | list[int] = "one two three", **options: Any) -> tuple[Pipeline, EchoService]:
        ids = script if isinstance(script, list) else tokenizer.encode(script, add_special_tokens=False)
        service = EchoService(ids, **options)
        return pipeline_over(service, tokenizer, Transcripts(None)), service

    return opened


# --- over the real engine ---------------------------------------------------------------------------------------------


def test_the_answer_has_miis_fields(pipe, tokenizer):
    responses = pipe("The captain opens", max_new_tokens=8, do_sample=False, ignore_eos=True)
    assert isinstance(responses, list)
    [response] = responses
    assert isinstance(response, Response)
    assert response.prompt_length == len(tokenizer.encode("The captain opens", add_special_tokens=True))
    assert (response.generated_length, response.finish_reason) == (8, "length")
    assert repr(response) == str(response) == response.generated_text != ""
    assert response.hcache.prefill_tokens == response.prompt_length


def test_a_text_that_is_sent_again_is_restored_with_the_ids_that_were_generated(pipe, tokenizer):
    options = {"max_new_tokens": 70, "do_sample": False, "ignore_eos": True}
    [first] = pipe(STORY, **options)
    said = STORY + first.generated_text
    retold = tokenizer.encode(said, add_special_tokens=True)
    num_seen = first.prompt_length + first.generated_length - 1
    [second] = pipe(said + " And then?", **options)
    assert len(retold) != num_seen + 1, "a tokenizer that round-trips shows nothing"
    assert second.hcache.restored_tokens == num_seen // 64 * 64 > first.prompt_length
    assert second.hcache.miss_reason is None
    # the same by ids, which need no memory of texts
    ids = [*tokenizer.encode(STORY, add_special_tokens=True)]
    [again] = pipe([ids], **options)
    assert again.generated_text == first.generated_text


def test_a_conversation_survives_a_restart(demo_path, tmp_path):
    options = {"max_new_tokens": 70, "do_sample": False, "ignore_eos": True}
    with mii_hcache.pipeline(demo_path, state_dir=str(tmp_path / "a"), **SETTINGS) as before:
        [first] = before(STORY, **options)
        said = STORY + first.generated_text
        [expected] = before(said + " And then?", **options)
    with mii_hcache.pipeline(demo_path, state_dir=str(tmp_path / "a"), **SETTINGS) as after:
        [second] = after(said + " And then?", **options)
    num_seen = first.prompt_length + first.generated_length - 1
    assert second.hcache.restored_tokens == num_seen // 64 * 64
    assert second.hcache.restored_from == "file"
    assert second.generated_text == expected.generated_text
    with pytest.raises(HCacheError, match="shutting down"):
        after("too late")
    after.destroy()


def test_prompts_of_a_call_are_answered_in_order(pipe):
    prompts = ["The doctor", STORY, "A rocket climbs over the harbour and"]
    options = {"max_new_tokens": 9, "do_sample": False, "ignore_eos": True}
    together = [response.generated_text for response in pipe(prompts, **options)]
    assert together == [pipe(prompt, **options)[0].generated_text for prompt in prompts]


def test_sampling_is_the_default_and_a_seed_repeats_it(pipe):
    told = [pipe("The garden", max_new_tokens=12, ignore_eos=True, seed=seed)[0].generated_text for seed in (1, 1, 2)]
    assert told[0] == told[1] != told[2]
    free = {pipe("The garden", max_new_tokens=12, ignore_eos=True)[0].generated_text for _ in range(3)}
    assert len(free) > 1


def test_an_answer_ends_before_its_stop_string(pipe):
    options = {"do_sample": False, "ignore_eos": True}
    [whole] = pipe(STORY, max_new_tokens=40, **options)
    text = whole.generated_text
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    [cut] = pipe(STORY, max_new_tokens=40, stop=[stop, "never said"], **options)
    assert cut.generated_text == text[: text.index(stop)]
    assert cut.finish_reason == "stop" and cut.generated_length < whole.generated_length
    [resumed] = pipe(STORY + cut.generated_text + stop, max_new_tokens=5, **options)
    assert resumed.hcache.restored_tokens == resumed.hcache.cached_tokens >= whole.prompt_length // 64 * 64


# --- names and defaults -----------------------------------------------------------------------------------------------


def test_names_and_defaults_are_miis(echo, tokenizer):
    pipe, service = echo()
    pipe([5, 6, 7])
    assert service.requests[0].sampling == SamplingParams(
        max_new_tokens=97, temperature=1.0, top_p=0.9, top_k=0, seed=None, stop_token_ids=tokenizer.stop_token_ids
    )
    pipe, service = echo()
    pipe([5, 6, 7], max_new_tokens=4, top_p=0.5, top_k=9, temperature=0.3, seed=11, ignore_eos=True)
    assert service.requests[0].sampling == SamplingParams(
        max_new_tokens=4, temperature=0.3, top_p=0.5, top_k=9, seed=11, stop_token_ids=frozenset()
    )
    pipe, service = echo()
    pipe([5, 6, 7], do_sample=False, temperature=0.7)
    assert service.requests[0].sampling.temperature == 0


@pytest.mark.parametrize(
    ("limits", "num_new"),
    [
        ({}, 90),
        ({"max_new_tokens": 5}, 5),
        ({"max_length": 12}, 2),
        ({"max_length": 12, "max_new_tokens": 50}, 2),
        ({"max_length": 50, "max_new_tokens": 4}, 4),
        ({"max_length": 5000}, 90),
        ({"max_new_tokens": 5000}, 90),
    ],
)
def test_the_tighter_limit_counts(echo, limits, num_new):
    pipe, service = echo()
    pipe([5] * 10, **limits)
    assert service.requests[0].sampling.max_new_tokens == num_new


@pytest.mark.parametrize(
    ("prompts", "count"),
    [("a text", 1), (["a text"], 1), (["a", "b"], 2), ([5, 6], 1), ([[5, 6]], 1), ([[5], [6], "c"], 3), ([], 0)],
)
def test_prompts_are_texts_or_token_ids(echo, prompts, count):
    pipe, service = echo(num_awaited=count)  # nothing is answered before all are there: they run side by side
    assert len(pipe(prompts)) == len(service.requests) == count
    assert len({request.request_id for request in service.requests}) == count


def test_the_whole_text_when_asked(echo, tokenizer):
    pipe, _ = echo(" and so on")
    [response] = pipe("Once upon a time", return_full_text=True)
    assert response.generated_text == "Once upon a time and so on"
    pipe, _ = echo(" and so on")
    ids = tokenizer.encode("Once upon a time", add_special_tokens=True)
    assert pipe(ids, return_full_text=True)[0].generated_text == "Once upon a time and so on"
    assert pipe(ids)[0].generated_text == " and so on"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("two", "one "),
        (["three", "two"], "one "),
        (["e t", "on"], ""),  # the one that is complete first
        (["wo thr"], "one t"),
        (("four",), "one two three"),
    ],
)
def test_stop_strings_cut_where_they_begin(echo, tokenizer, stop, text):
    pipe, _ = echo("one two three")
    [response] = pipe("count: ", stop=stop)
    assert response.generated_text == text
    assert response.finish_reason == ("length" if text == "one two three" else "stop")
    [(num_chars, ids)] = [pipe._texts.longest_prefix(pipe._tenant, f"count: {text}!") or (0, [])]
    assert num_chars == (len(f"count: {text}") if text else 0)
    assert tokenizer.decode(ids) == (f"count: {text}" if text else "")


def test_of_stop_strings_within_a_token_the_first_one_cuts(echo, tokenizer):
    token_id = max(range(tokenizer.vocab_size), key=lambda token_id: len(tokenizer.decode([token_id])))
    text = tokenizer.decode([token_id])
    pipe, _ = echo([token_id])
    [response] = pipe("x", stop=[text[4:7], text[1:3]])
    assert response.generated_text == text[: text.index(text[1:3])]
    assert len(text) > 6


def test_a_space_at_the_start_of_an_answer_is_kept(tokenizer):
    service = EchoService(tokenizer.encode(" a space", add_special_tokens=False))
    pipe = pipeline_over(service, SpaceDropping(tokenizer), Transcripts(None))
    assert pipe("There is")[0].generated_text == " a space"
    assert pipe("There is", stop=" s")[0].generated_text == " a"


def test_texts_are_known_to_one_tokenizer_only(tokenizer):
    letters = [tokenizer.encode_continuation(char)[0] for char in "lighthouse"]
    service, texts = EchoService(letters), Transcripts(None)
    pipeline_over(service, tokenizer, texts)("The ")
    known_ids = [*tokenizer.encode("The ", add_special_tokens=True), *letters]
    for one, is_known in ((tokenizer, True), (SpaceDropping(tokenizer), False)):
        pipeline_over(service, one, texts)("The lighthouse")
        assert (service.requests[-1].prompt_token_ids == known_ids) == is_known


def test_a_stop_token_is_no_part_of_what_is_remembered(echo, tokenizer):
    eos = tokenizer.eos_token_id
    ids = tokenizer.encode(" fine", add_special_tokens=False)
    pipe, service = echo([*ids, eos])
    [response] = pipe("All is")
    assert (response.generated_text, response.finish_reason) == (" fine", "stop")
    assert response.generated_length == len(ids) + 1
    service.requests.clear()
    pipe("All is fine, thanks")
    prompt = list(service.requests[0].prompt_token_ids)
    assert prompt[: -len(tokenizer.encode_continuation(", thanks"))] == [
        *tokenizer.encode("All is", add_special_tokens=True),
        *ids,
    ]
    pipe, _ = echo([*ids, eos], num_awaited=1)
    [response] = pipe("All is", ignore_eos=True)
    assert (response.generated_text, response.finish_reason) == (" fine", "length")


def test_ids_that_were_generated_are_sent_again(echo, tokenizer):
    letters = [tokenizer.encode_continuation(char)[0] for char in "lighthouse"]  # no tokenizer would cut it so
    pipe, service = echo(letters)
    pipe("The light")
    service.requests.clear()
    pipe("The lightlighthouse again")
    prompt = list(service.requests[0].prompt_token_ids)
    head = tokenizer.encode("The light", add_special_tokens=True)
    assert prompt == [*head, *letters, *tokenizer.encode_continuation(" again")]
    assert prompt != tokenizer.encode("The lightlighthouse again", add_special_tokens=True)


def test_characters_of_several_tokens(echo, tokenizer):
    pipe, _ = echo("né 猫 🚀")
    assert pipe("x ")[0].generated_text == "né 猫 🚀"
    pipe, _ = echo("né 猫 🚀")
    assert pipe("x ", stop="猫")[0].generated_text == "né "
    rocket = tokenizer.encode_continuation("🚀")
    pipe, _ = echo(rocket[2:])
    prompt = [*tokenizer.encode("x ", add_special_tokens=True), *rocket[:2]]
    assert pipe(prompt)[0].generated_text == tokenizer.decode(rocket[2:])  # its first half ends the prompt


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": True}, "stream is not supported"),
        ({"min_new_tokens": 3}, "min_new_tokens is not supported"),
        ({"stop": ["x", ""]}, "must not be empty"),
        ({"max_length": 3}, "together may have 3"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"temperature": -1.0}, "temperature must be"),
    ],
)
def test_what_is_not_served_is_refused_by_name(echo, options, message):
    pipe, service = echo()
    with pytest.raises((RequestError, ConfigError), match=message):
        pipe([5, 6, 7], **options)
    assert not service.requests


def test_an_unknown_option_is_refused_by_name(echo):
    with pytest.raises(TypeError, match="repetition_penalty"):
        echo()[0]("x", repetition_penalty=2)


def test_no_prompts_are_no_answers_but_an_empty_one_is_refused(echo):
    with pytest.raises(RequestError, match="no tokens"):
        echo()[0]([[]])
    with pytest.raises(RequestError, match="prompts must be"):
        echo()[0]([[1.5]])


def test_one_failure_cancels_the_others(echo):
    pipe, service = echo(num_awaited=2, error=HCacheError("out of luck"))
    with pytest.raises(HCacheError, match="out of luck"):
        pipe(["a", "b"])
    assert service.cancelled == [request.request_id for request in service.requests]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replica_num": 2}, "unknown setting replica_num; known: .*kv_blocks"),
        ({"tensor_parallel": 0}, "tensor_parallel must be >= 1, got 0"),
        ({"tensor_parallel": 2, "save": "direct"}, "only one rank can save so"),
        ({"model_name_or_path": "b"}, "model is 'a' and model_name_or_path 'b'"),
        ({"method": "magic"}, "method must be one of"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(settings, message):
    with pytest.raises(ConfigError, match=message):
        mii_hcache.pipeline("a", **settings)


def test_miis_name_for_the_model(monkeypatch):
    opened: list[mii_hcache.HCacheConfig] = []
    import mii_hcache.engine.open as opening

    def refuse(config: mii_hcache.HCacheConfig, progress: object) -> None:
        opened.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr(opening, "open_service", refuse)
    for call in (
        lambda: mii_hcache.pipeline("a/b", block_size=32, tensor_parallel=1),
        lambda: mii_hcache.pipeline(model_name_or_path="a/b", block_size=32),
        lambda: mii_hcache.pipeline(model="a/b", model_name_or_path="a/b", block_size=32),
    ):
        with pytest.raises(ConfigError, match="far enough"):
            call()
    assert opened == [mii_hcache.HCacheConfig(model="a/b", block_size=32)] * 3


# --- the package's names ----------------------------------------------------------------------------------------------


def test_public_names_are_there_and_listed():
    assert set(mii_hcache.__all__) == {"HCacheConfig", "__version__", "attach", "pipeline"}
    assert set(mii_hcache.__all__) <= set(dir(mii_hcache))
    assert all(callable(getattr(mii_hcache, name)) for name in mii_hcache.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'serve_everything'"):
        mii_hcache.serve_everything  # noqa: B018
