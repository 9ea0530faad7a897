"""One request to an OpenAI-compatible server on this machine, with the time of every token.

Prompts are token ids, so that lengths are exact. The generated ids come back by `return_token_ids` (vLLM's extension,
which our server has too): the next round's prompt is what was said, token for token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SAVE_POLL_S = 0.05
_AT_REST = ("spans_pending", "requests_running", "requests_waiting", "requests_restoring")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back, in `time.perf_counter` seconds."""

    sent_s: float
    finished_s: float
    token_times_s: tuple[float, ...] = ()
    """When each generated token arrived here."""
    token_ids: tuple[int, ...] = ()
    hcache: Mapping[str, Any] = field(default_factory=dict)
    """The server's own report: where the prompt's tokens came from."""
    error: str = ""
    """Why there is no whole answer; empty when there is."""


def checked_url(url: str) -> str:
    """Raises ValueError for another machine: a load test is asked for by whoever runs the server."""
    if urlsplit(url).hostname not in LOOPBACK:
        raise ValueError(f"url must be on this machine ({', '.join(LOOPBACK)}), got {url!r}")
    return url.rstrip("/")


class Client:
    """Requests side by side over one pool of connections. For one event loop; an async context manager."""

    def __init__(self, url: str, *, timeout_s: float = 600.0) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=checked_url(url), timeout=timeout_s, limits=limits, trust_env=False)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, prompt: Sequence[int], num_tokens: int, *, salt: str = "") -> Answer:
        """Exactly `num_tokens` greedy tokens, streamed. Never raises for what a server or a network does: that is in
        `error`."""
        body = {
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": salt or None,
        }
        content = json.dumps(body, separators=(",", ":")).encode()
        sent_s = time.perf_counter()
        ids: list[int] = []
        times_s: list[float] = []
        hcache: dict[str, Any] = {}
        error = ""
        try:
            async for event in self._events(content):
                now_s = time.perf_counter()
                if "error" in event:
                    error = str(event["error"].get("message", event["error"]))
                    break
                hcache = event.get("hcache") or hcache
                for choice in event["choices"]:
                    told = choice.get("token_ids") or ()
                    ids += told
                    times_s += [now_s] * len(told)
        except (httpx.HTTPError, ValueError) as reason:
            error = f"{type(reason).__name__}: {reason}"
        if not error and len(ids) != num_tokens:
            error = f"asked for {num_tokens} tokens, got {len(ids)}"
        return Answer(
            sent_s=sent_s,
            finished_s=time.perf_counter(),
            token_times_s=tuple(times_s),
            token_ids=tuple(ids),
            hcache=hcache,
            error=error,
        )

    async def _events(self, content: bytes) -> AsyncIterator[dict[str, Any]]:
        """Of a stream, as they come. Raises ValueError when it does not end as it should."""
        headers = {"Content-Type": "application/json"}
        async with self._http.stream("POST", "/v1/completions", content=content, headers=headers) as response:
            if response.status_code != 200:
                raise ValueError(f"{response.status_code} {(await response.aread()).decode(errors='replace')[:300]}")
            rest = b""
            async for piece in response.aiter_bytes():
                *lines, rest = (rest + piece).split(b"\n\n")
                for line in lines:
                    if line == b"data: [DONE]":
                        return
                    if line.startswith(b"data: "):
                        yield json.loads(line[6:])
        raise ValueError("the stream ended without [DONE]")

    async def until_saved(self, limit_s: float = 60.0) -> None:
        """Returns when the server is at rest and what it saves has reached its store, so that the next round can find
        it. Raises TimeoutError. At once for a server without our metrics."""
        stop_s = time.monotonic() + limit_s
        while True:
            response = await self._http.get("/metrics")
            lines = response.text.splitlines() if response.status_code == 200 else []
            values = dict(line.split(" ", 1) for line in lines if line.startswith("mii_hcache_") and "{" not in line)
            busy = [name for name in _AT_REST if float(values.get(f"mii_hcache_{name}", 0.0))]
            if not busy:
                return
            if time.monotonic() > stop_s:
                raise TimeoutError(f"the server is not at rest after {limit_s:g} s: {', '.join(busy)}")
            await asyncio.sleep(_SAVE_POLL_S)
