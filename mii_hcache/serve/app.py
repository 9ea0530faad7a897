"""The HTTP application: OpenAI's routes, health and metrics over a generation service."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware

from mii_hcache import __version__
from mii_hcache.engine.tokenizer import Tokenizer
from mii_hcache.runtime.generation import GenerationService
from mii_hcache.serve.access import Access
from mii_hcache.serve.answering import Answering
from mii_hcache.serve.body import MAX_BODY_BYTES, openapi_body
from mii_hcache.serve.errors import install_error_answers, unknown_model
from mii_hcache.serve.gate import KnownHosts, NeedsKey
from mii_hcache.serve.metrics import CONTENT_TYPE, CountRequests, ServerMetrics
from mii_hcache.serve.openai_schema import ChatBody, CompletionBody
from mii_hcache.serve.reply_schema import (
    ChatReply,
    CompletionReply,
    ModelCard,
    ModelList,
    health_responses,
    metrics_responses,
    responses_of,
)
from mii_hcache.serve.request_log import LogRequests
from mii_hcache.serve.text import KnownTexts


def create_app(
    service: GenerationService,
    tokenizer: Tokenizer,
    known_texts: KnownTexts,
    model_name: str,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    access: Access | None = None,
) -> FastAPI:
    """An application for one event loop. It closes nothing of what it is given. `access`: by default everybody's who
    can reach it under a loopback name.

    `app.state.answering` is the `Answering` behind the routes; set its `draining` to refuse new work.
    """
    metrics = ServerMetrics(service)
    answering = Answering(
        service=service,
        tokenizer=tokenizer,
        known_texts=known_texts,
        model_name=model_name,
        metrics=metrics,
        max_body_bytes=max_body_bytes,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await answering.wait_for_cancelled()

    app = FastAPI(
        title="mii_hcache",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.answering = answering
    _add_middleware(app, access or Access(), metrics)
    _add_openai_routes(app, answering)
    _add_watching_routes(app, answering, metrics)
    return app


def _add_middleware(app: FastAPI, access: Access, metrics: ServerMetrics) -> None:
    """From the innermost to the outermost two, which see the status of every answer."""
    app.add_middleware(NeedsKey, keys=access.keys)
    if access.origins:  # a browser asks before it sends a key, without the key
        app.add_middleware(
            CORSMiddleware, allow_origins=list(access.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(KnownHosts, access=access)
    install_error_answers(app)
    app.add_middleware(CountRequests, metrics=metrics)
    app.add_middleware(LogRequests)


def _add_openai_routes(app: FastAPI, answering: Answering) -> None:
    card = {
        "id": answering.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "mii_hcache",
        "max_model_len": answering.max_context_tokens,
    }

    model_param = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    generation_errors = (404, 413, 429, 500, 503)

    @app.get("/v1/models", responses=responses_of(ModelList))
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get(
        "/v1/models/{model:path}", responses=responses_of(ModelCard, 404), openapi_extra={"parameters": [model_param]}
    )
    async def model(request: Request) -> Response:
        name = request.path_params["model"]
        if name != answering.model_name:
            raise unknown_model(name, answering.model_name)
        return JSONResponse(card)

    @app.post(
        "/v1/completions",
        responses=responses_of(CompletionReply, *generation_errors, streams=True),
        openapi_extra=openapi_body(CompletionBody),
    )
    async def completions(request: Request) -> Response:
        return await answering.complete(request)

    @app.post(
        "/v1/chat/completions",
        responses=responses_of(ChatReply, *generation_errors, streams=True),
        openapi_extra=openapi_body(ChatBody),
    )
    async def chat_completions(request: Request) -> Response:
        return await answering.chat(request)


def _add_watching_routes(app: FastAPI, answering: Answering, metrics: ServerMetrics) -> None:
    @app.get("/health", responses=health_responses())
    async def health() -> Response:
        """200 while requests are taken, 503 while the last ones finish (`draining`) or when the engine has died, or
        one of its processes (`failed`)."""
        status = "failed" if not answering.engine_is_alive else "draining" if answering.draining else "ok"
        body = {
            "status": status,
            "model": answering.model_name,
            "max_context_tokens": answering.max_context_tokens,
        }
        if answering.ranks:
            body["ranks"] = answering.ranks
        return JSONResponse(body, status_code=200 if status == "ok" else 503)

    @app.get("/metrics", responses=metrics_responses(), response_class=PlainTextResponse)
    def metrics_text() -> Response:
        """Prometheus's text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)
