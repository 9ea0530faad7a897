"""A line for each finished request."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mii_hcache.serve.errors import CLIENT_CLOSED_REQUEST
from mii_hcache.serve.generations import Finished
from mii_hcache.serve.logs import REQUESTS
from mii_hcache.serve.replies import hcache_of, usage_of

NOTE = "mii_hcache.note"
"""Key of the scope under which a request's `RequestNote` lies."""

_log = logging.getLogger(REQUESTS)


@dataclass(kw_only=True)
class RequestNote:
    """What the routes tell about a request while they answer it."""

    request_id: str | None = None
    num_answers: int = 0
    finished: list[Finished] = field(default_factory=list)


class LogRequests:
    """ASGI middleware: logs each request at its end, with numbers and no words of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; other scopes pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note, status, start = RequestNote(), CLIENT_CLOSED_REQUEST, perf_counter()
        scope[NOTE] = note

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        finally:
            path = scope.get("raw_path", b"").decode("latin-1")  # escaped: no line of it is taken for a line of ours
            level = logging.INFO if path.startswith("/v1/") else logging.DEBUG
            if _log.isEnabledFor(level):
                _write(level, note, scope["method"], path, status, perf_counter() - start)


def _write(level: int, note: RequestNote, method: str, path: str, status: int, seconds: float) -> None:
    words = [f"{method} {path} {status} in {seconds:.3f} s"]
    fields: dict[str, Any] = {"method": method, "path": path, "status": status, "duration_ms": round(1e3 * seconds, 3)}
    if note.request_id is not None:
        fields["id"] = note.request_id
        fields["finished"] = len(note.finished) == note.num_answers
        words.append(note.request_id if fields["finished"] else f"{note.request_id} was not finished")
    if note.finished:
        usage, hcache = usage_of(note.finished), hcache_of(note.finished)
        fields |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        fields |= {"ttft_ms": hcache["ttft_ms"], "hcache": hcache}
        words.append(
            f"{usage['prompt_tokens']} prompt tokens "
            f"({hcache['resident_tokens']} resident, {hcache['restored_tokens']} restored)"
        )
        words.append(f"{usage['completion_tokens']} generated")
        if hcache["ttft_ms"] is not None:
            words.append(f"first token after {hcache['ttft_ms']:.0f} ms")
    _log.log(level, "%s", ", ".join(words), extra={"fields": fields})
