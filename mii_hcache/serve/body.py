"""A request's body: read up to a limit, parsed, checked."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from mii_hcache.serve.errors import ApiError

MAX_BODY_BYTES = 32 * 2**20
_PARSED_IN_PLACE_BYTES = 64 * 2**10
"""Larger bodies are parsed on another thread."""

BodyT = TypeVar("BodyT", bound=BaseModel)


async def read_body(request: Request, model: type[BodyT], *, max_bytes: int = MAX_BODY_BYTES) -> BodyT:
    """Raises ApiError (413, or 400 without a JSON content type) or pydantic's ValidationError."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # a page in a browser could send anything else without asking first
        raise ApiError(400, f"Content-Type must be application/json, got {media_type!r}.", code="invalid_content_type")
    too_large = ApiError(413, f"The body is larger than {max_bytes} bytes.", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise too_large
    if len(body) <= _PARSED_IN_PLACE_BYTES:
        return model.model_validate_json(body)
    return await asyncio.to_thread(model.model_validate_json, body)


def openapi_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads this body."""
    schema = inlined(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references (ours do not recurse), to stand anywhere in a document."""

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(schema["$defs"][node["$ref"].rpartition("/")[2]])
        return {key: inline(value) for key, value in node.items() if key != "$defs"}

    described: dict[str, Any] = inline(schema)
    return described
