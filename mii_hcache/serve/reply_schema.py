"""What the server answers, for the OpenAPI document. Replies are built elsewhere; tests hold them against this."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mii_hcache.serve.body import inlined

Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0)]
Logprob = Annotated[float, Field(le=1e-3)]  # rounding may lift a certain token's above 0


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetail(_Reply):
    """What went wrong, in OpenAI's words."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    """The field of the request that is wrong."""
    code: str | None


class ErrorReply(_Reply):
    """Every answer that is no success."""

    error: ErrorDetail


class HCache(_Reply):
    """Where the prompt's tokens came from."""

    resident_tokens: Count
    """Still in GPU memory."""
    restored_tokens: Count
    """Brought back from saved state."""
    recomputed_tokens: Count
    """Computed again while the others were read, as the plan of the restore had it."""
    restored_from: str | None
    """`memory`, `file`, or both."""
    method: str | None
    """`hidden`, `kv`, `recompute`, or several."""
    restore_ms: Milliseconds
    planned_ms: Milliseconds | None
    """What the plan expected of the restore."""
    prefill_tokens: Count
    """Computed."""
    ttft_ms: Milliseconds | None
    """From submission to the first token."""
    miss_reason: str | None
    """Why saved state was not used, or not as far as it could have been."""


class PromptTokensDetails(_Reply):
    """OpenAI's."""

    cached_tokens: Count
    """Not computed: resident or restored."""


class Usage(_Reply):
    """OpenAI's."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(_Reply):
    """A place for each token in each list."""

    tokens: list[str]
    token_logprobs: list[Logprob | None]
    top_logprobs: list[dict[str, Logprob] | None] | None
    text_offset: list[Count]


class ChatToken(_Reply):
    """A token and its logprob."""

    token: str
    logprob: Logprob
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ScoredChatToken(ChatToken):
    """With those that were likeliest in its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(_Reply):
    """One entry for each token of the message."""

    content: list[ScoredChatToken]
    refusal: None


FinishReason = Literal["stop", "length"]


class _Choice(_Reply):
    index: Count
    finish_reason: FinishReason
    token_ids: list[Count] | None = None
    """Generated, when `return_token_ids` asks for them."""
    hcache: HCache | None = None
    """The choice's own, when there are several."""


class CompletionChoice(_Choice):
    """The answer to one prompt."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[Count] | None = None
    """When `return_token_ids` asks for them."""


class ChatMessage(_Reply):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    """The answer."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class _Whole(_Reply):
    id: str
    created: Count
    model: str
    usage: Usage
    hcache: HCache


class CompletionReply(_Whole):
    """The answer to `POST /v1/completions`, not streamed."""

    object: Literal["text_completion"]
    choices: Annotated[list[CompletionChoice], Field(min_length=1)]


class ChatReply(_Whole):
    """The answer to `POST /v1/chat/completions`, not streamed."""

    object: Literal["chat.completion"]
    choices: Annotated[list[ChatChoice], Field(min_length=1, max_length=1)]
    prompt_token_ids: list[Count] | None = None
    """When `return_token_ids` asks for them."""


class ModelCard(_Reply):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    max_model_len: Count
    """Most tokens of a conversation."""


class ModelList(_Reply):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(_Reply):
    """Whether requests are taken."""

    status: Literal["ok", "draining", "failed"]
    model: str
    max_context_tokens: Count
    ranks: dict[str, Literal["starting", "imported", "met", "ready", "gone"]] | None = None
    """What each process of a model over several does, by its number; not there for others."""


_STREAM: dict[str, Any] = {"text/event-stream": {}}
"""Chunks; OpenAPI has no schema for what is in events."""
_ERRORS = {
    400: "The request is malformed, or can never be served as it is",
    401: "No key, or a wrong one",
    403: "Asked under a name, or by a page, that is not allowed",
    404: "No such model",
    413: "The body is too large",
    429: "Too many requests wait; Retry-After says when to come back",
    500: "A failure of the engine or of this server",
    503: "The server is shutting down, or its engine has failed",
}


def responses_of(reply: type[BaseModel], *errors: int, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route."""
    described: dict[int | str, dict[str, Any]] = {200: {"content": _json(reply) | (_STREAM if streams else {})}}
    for status in (400, 401, 403, *errors):
        described[status] = {"description": _ERRORS[status], "content": _json(ErrorReply)}
    return described


def health_responses() -> dict[int | str, dict[str, Any]]:
    """Of `/health`, which says what it has to say with 503, too, and to those without a key."""
    described = responses_of(Health)
    del described[401]
    return described | {503: {"description": "No requests are taken", "content": _json(Health)}}


def metrics_responses() -> dict[int | str, dict[str, Any]]:
    """Of `/metrics`."""
    return responses_of(Health) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": inlined(model.model_json_schema(mode="serialization"))}}
