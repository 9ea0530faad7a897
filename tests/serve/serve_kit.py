"""A generation service without a model, transcripts in a dict, and a server on a loopback port."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import uvicorn

from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.errors import HCacheError, RequestError
from mii_hcache.runtime.generation import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    RestoreReport,
    TokenLogprob,
)

MODEL = "demo/model"
ASK = [{"role": "user", "content": "Tell me about lighthouses."}]

HCACHE_FIELDS = [
    "resident_tokens",
    "restored_tokens",
    "recomputed_tokens",
    "restored_from",
    "method",
    "restore_ms",
    "planned_ms",
    "prefill_tokens",
    "ttft_ms",
    "miss_reason",
]


class DictTexts:
    """`KnownTexts` by brute force."""

    def __init__(self) -> None:
        self.texts: dict[tuple[bytes, str], list[int]] = {}

    def remember(self, tenant: bytes, text: str, token_ids: Sequence[int]) -> None:
        self.texts[tenant, text] = list(token_ids)

    def longest_prefix(self, tenant: bytes, text: str) -> tuple[int, list[int]] | None:
        known = [key for key in list(self.texts) if key[0] == tenant and text.startswith(key[1])]
        if not known:
            return None
        key = max(known, key=lambda key: len(key[1]))
        return len(key[1]), list(self.texts[key])

    def flush(self) -> None:
        """Nothing here outlives the process."""


@dataclass
class _Running:
    request: GenerationRequest
    tokens: list[int]
    start: float = field(default_factory=time.perf_counter)
    done: list[int] = field(default_factory=list)
    ttft_ms: float | None = None


def tokens_for(request: GenerationRequest) -> list[int]:
    """Random ids that prompt and seed decide; an end token after about every fortieth."""
    rng = random.Random(f"{list(request.prompt_token_ids)} {request.sampling.seed}")
    count = request.sampling.max_new_tokens
    return [2 if rng.random() < 1 / 40 else rng.randrange(6, 2048) for _ in range(count)]


def logprob_for(position: int, token_id: int, num_top: int) -> TokenLogprob:
    """Made up; position and token decide."""
    top = tuple(((31 * position + 7 * idx) % 2048, -0.5 - idx / 8) for idx in range(num_top))
    return TokenLogprob(token_id=token_id, logprob=-1.0 - (37 * token_id + position) % 64 / 8, top=top)


class FakeService:
    """A `GenerationService` whose answers a test chooses. Steps every running request by one token, on its own thread.

    Reports as resident what an earlier sequence of the tenant has in common with the prompt, or, when a test says so,
    as restored.
    """

    geometry = ModelGeometry(num_layers=4, hidden_size=256, num_heads=8, num_kv_heads=8, head_size=32, dtype="float32")
    vocab_size = 2048
    max_context_tokens = 512

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[str, _Running] = {}
        self._cancelled: set[str] = set()
        self._closing = False
        self.reset()
        self._thread = threading.Thread(target=self._run, name="fake engine", daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """As new, for the next test."""
        self.script: Callable[[GenerationRequest], list[int]] = tokens_for
        self.step_s = 0.0
        self.before_step: Callable[[], None] = lambda: None
        self.fail_after: int | None = None
        self.restored_from: str | None = None
        self.refuse: Callable[[], None] = lambda: None
        self.is_alive = True
        self.num_generated = 0
        self.submitted: list[GenerationRequest] = []
        self.finished: list[GenerationResult] = []
        self.cancelled: list[str] = []
        self.sequences: list[tuple[bytes, list[int]]] = []
        self.values: dict[str, float] = {"steps_total": 7.0, "free_blocks": 3.0}

    def submit(self, request: GenerationRequest) -> None:
        ids = request.prompt_token_ids
        if not ids or len(ids) + request.sampling.max_new_tokens > self.max_context_tokens:
            raise RequestError(f"a sequence has 1 to {self.max_context_tokens} tokens", code="context_length_exceeded")
        if not all(0 <= token_id < self.vocab_size for token_id in ids):
            raise RequestError(f"token ids must be in [0, {self.vocab_size})", param="prompt")
        with self._changed:
            if self._closing or not self.is_alive:
                raise HCacheError("the service is closed")
            self.refuse()
            self.submitted.append(request)
            self._running[request.request_id] = _Running(request, self.script(request))
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self.cancelled.append(request_id)
            self._cancelled.add(request_id)
            self._changed.notify()

    def metrics(self) -> dict[str, float]:
        return dict(self.values)

    def close(self, *, drain: bool = True) -> None:
        with self._changed:
            self._closing = True
            if not drain:
                self._cancelled.update(self._running)
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._running and not self._closing:
                    self._changed.wait()
                if not self._running:
                    return
                batch = list(self._running.values())
            self.before_step()
            for running in batch:
                self._step(running)
            if self.step_s:
                time.sleep(self.step_s)

    def _step(self, running: _Running) -> None:
        request = running.request
        if request.request_id in self._cancelled:
            self._finish(running, FinishReason.CANCELLED)
        elif self.fail_after is not None and len(running.done) >= self.fail_after:
            self._finish(running, FinishReason.ERROR, HCacheError("the fake engine broke"))
        elif len(running.done) == len(running.tokens):
            self._finish(running, FinishReason.LENGTH)
        else:
            token_id = running.tokens[len(running.done)]
            running.ttft_ms = running.ttft_ms or 1e3 * (time.perf_counter() - running.start)
            self._tell_logprobs(request, len(running.done), token_id)
            running.done.append(token_id)
            self.num_generated += 1
            if request.on_token(token_id) or token_id in request.sampling.stop_token_ids:
                self._finish(running, FinishReason.STOP)
            elif len(running.done) == request.sampling.max_new_tokens:
                self._finish(running, FinishReason.LENGTH)

    def _tell_logprobs(self, request: GenerationRequest, num_done: int, token_id: int) -> None:
        num_top, prompt = request.num_top_logprobs, request.prompt_token_ids
        if num_top is None:
            return
        if num_done == 0 and request.on_prompt_logprobs is not None:
            told = [logprob_for(idx, prompt_id, num_top) for idx, prompt_id in enumerate(prompt)]
            request.on_prompt_logprobs([None, *told[1:]])
        if request.on_logprob is not None:
            request.on_logprob(logprob_for(len(prompt) + num_done, token_id, num_top))

    def _finish(self, running: _Running, reason: FinishReason, error: HCacheError | None = None) -> None:
        request = running.request
        prompt = list(request.prompt_token_ids)
        resident = max((_common(prompt, ids) for salt, ids in self.sequences if salt == request.tenant_salt), default=0)
        resident = min(resident, len(prompt) - 1)
        self.sequences.append((request.tenant_salt, prompt + running.done))
        where = {"resident_tokens": resident}
        if self.restored_from is not None:
            where = {"restored_tokens": resident, "restored_from": self.restored_from, "method": "hidden"}
        report = RestoreReport(
            **where,
            restore_ms=1.23456 if self.restored_from else 0.0,
            prefill_tokens=len(prompt) - resident,
            ttft_ms=running.ttft_ms,
            miss_reason=request.miss_hint,
        )
        with self._changed:
            del self._running[request.request_id]
        result = GenerationResult(finish_reason=reason, token_ids=tuple(running.done), report=report, error=error)
        self.finished.append(result)
        request.on_finish(result)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    for idx, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return idx
    return min(len(left), len(right))


@contextlib.contextmanager
def live_server(app) -> Iterator[str]:
    """The base URL of `app` on a free port, until the block ends."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def says(service, tokenizer, text):
    """Make the engine generate these tokens, then the end token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    service.script = lambda request: [*ids, tokenizer.eos_token_id]
    return ids


def bytes_of(tokenizer, text):
    """A token per byte, as a model might split any text."""
    from tokenizers import pre_tokenizers

    backend = tokenizer._backend
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    return [backend.token_to_id(char) for char in mapped]
