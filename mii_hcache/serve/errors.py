"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}` under the right status."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mii_hcache.errors import HCacheError, QueueFullError, RequestError

_log = logging.getLogger(__name__)

_KINDS = {429: "rate_limit_error"}
"""`type` of an error; of other statuses below 500 `invalid_request_error`, above it `server_error`."""
CLIENT_CLOSED_REQUEST = 499
"""nginx's number for a client that went away; only logs and metrics see it."""


class ApiError(Exception):
    """An error with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


def unknown_model(name: str, served: str) -> ApiError:
    """404."""
    return ApiError(
        404, f"The model `{name}` does not exist. This server serves `{served}`.", param="model", code="model_not_found"
    )


def shutting_down() -> ApiError:
    """503."""
    return ApiError(503, "The server is shutting down.", code="shutting_down")


def engine_failed() -> ApiError:
    """503."""
    return ApiError(503, "The engine has failed; the server's log says why. It must be started again.", code="failed")


def api_error_of(error: Exception) -> ApiError:
    """What a client is told about an error. Errors that are not ours are logged and stay unexplained."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _of_validation(error)
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, QueueFullError):
        retry_after_s = max(1, math.ceil(error.retry_after_s))
        return ApiError(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": str(retry_after_s)})
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, HCacheError):
        _log.error("request failed: %s", error)
        return ApiError(500, str(error))
    _log.error("request failed", exc_info=error)
    return ApiError(500, "Internal server error.", code="internal_error")


def _of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, with the name of its field."""
    first = error.errors(include_url=False, include_input=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return ApiError(400, str(cause), param=cause.param, code=cause.code)
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {cause}", code="invalid_json")
    param = ".".join(map(str, first["loc"])) or None
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    reason = str(cause) if isinstance(cause, ValueError) else first["msg"]
    where = f"Invalid value for '{param}'" if param else "Invalid body"
    return ApiError(400, f"{where}: {reason}.", param=param, code="invalid_value")


def install_error_answers(app: FastAPI) -> None:
    """Every error that leaves `app` has OpenAI's shape: those of routing (404, 405) and of bugs (500) too."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            paths = sorted({path for route in app.routes if "{" not in (path := getattr(route, "path", "{"))})
            words = f"There is nothing at {request.url.path}. This server has {', '.join(paths)}."
            return answer_to(ApiError(404, words, code="not_found"))
        return answer_to(error)

    for kind in (ApiError, ClientGoneError, HCacheError, ValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_middleware(_AnswerBugs)


def answer_to(error: Exception) -> Response:
    """The answer to a request that failed. It is an ASGI application, too."""
    if isinstance(error, ClientGoneError):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    api_error = api_error_of(error)
    headers = api_error.headers or getattr(error, "headers", None)
    return JSONResponse(api_error.to_dict(), status_code=api_error.status, headers=headers)


class _AnswerBugs:
    """ASGI middleware: an error that nobody expected is a 500 like the others. Starlette's own way raises it once more
    after the answer, and the server then closes a connection that the client may be using again."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_and_look(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            await answer_to(error)(scope, receive, send)
