"""The requests of OpenAI's API that this server answers: what they may hold, and what is refused and why.

Types are strict (`"5"` is no number). Unknown fields are ignored, as OpenAI's clients and their relatives send many;
known fields that would change the answer and are not supported here are refused rather than ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from mii_hcache.errors import RequestError

MAX_STOP_CHARS = 65536
"""Of all stop strings together. Their number is not limited."""
MAX_PROMPTS = 256
"""Per request."""
MAX_TOP_LOGPROBS = 20
"""Likeliest tokens that can be asked for at each place."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's `max_tokens` of /v1/completions; a chat answer may fill the context."""

Prompt = str | list[int]

_Neutral = Mapping[str, tuple[Any, ...]]

_NEUTRAL: _Neutral = {
    "n": (None, 1),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "audio": (None,),
    "response_format": (None, {"type": "text"}),
}
"""Fields that are not supported, with the values under which their absence makes no difference."""


def _stops(value: Any) -> Any:
    """A string or a list of strings; empty ones, which some clients send, mean nothing."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("stop must be a string or an array of strings")
    if sum(map(len, stops)) > MAX_STOP_CHARS:
        raise ValueError(f"stop strings must have at most {MAX_STOP_CHARS} characters together")
    return [stop for stop in stops if stop]


def _prompts(value: Any) -> Any:
    """OpenAI's four shapes of `prompt` as a list of prompts."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        raise ValueError("prompt must be a string, an array of strings, an array of token ids or an array of those")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"prompt must hold at most {MAX_PROMPTS} prompts, got {len(prompts)}")
    return prompts


def _no_logprobs(value: Any) -> Any:
    """Clients of the chat API say `false` here, too."""
    return None if value is False else value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token_id) is int for token_id in value)


def _text_of(content: Any) -> Any:
    """A message's text; parts of type text are joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("content must be a string or an array of parts of type text")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("content parts must be of type text: this model reads text only")
    return "\n".join(part["text"] for part in content)


_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
}


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str,
        BeforeValidator(_text_of),
        WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _PART}]}),
    ]

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, message: Any) -> Any:
        if isinstance(message, Mapping) and (message.get("tool_calls") or message.get("role") in ("tool", "function")):
            raise RequestError("tool calls are not supported", param="messages", code="unsupported_value")
        return message

    def turn(self) -> dict[str, str]:
        """As chat templates take it; `developer` is the newer name of what they call `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class GenerationBody(BaseModel):
    """What both kinds of request have in common. `None` is the same as absent."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    unsupported: ClassVar[_Neutral] = _NEUTRAL

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[str],
        BeforeValidator(_stops),
        WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}]}),
    ] = []
    stop_token_ids: list[int] | None = None
    """End the answer as EOS does (not in OpenAI's API; also with `ignore_eos`)."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    """Go on to `max_tokens` or a stop string (not in OpenAI's API; benchmarks send it)."""
    min_tokens: int | None = Field(None, ge=0)
    return_token_ids: bool | None = None
    """Tell the ids of the prompt's and the answer's tokens (vLLM's name for it)."""
    cache_salt: str | None = Field(None, max_length=1024)
    """Requests with different salts never share saved state (vLLM's name for it)."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if isinstance(body, Mapping):
            for name, neutral in cls.unsupported.items():
                if body.get(name) not in neutral:
                    raise RequestError(f"{name} is not supported by this server", param=name, code="unsupported_value")
        return body

    @model_validator(mode="after")
    def _check_together(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        if self.min_tokens and not self.ignore_eos:
            raise RequestError("min_tokens needs ignore_eos", param="min_tokens", code="unsupported_value")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_answer_tokens(self) -> int | None:
        """The most tokens to generate, if the client says so."""
        return self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """Likeliest tokens to tell with each logprob; None: no logprobs."""
        return None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    unsupported: ClassVar[_Neutral] = {**_NEUTRAL, "top_logprobs": (None, 0)}

    max_tokens: int | None = Field(None, ge=0)
    """0 generates nothing: with `echo` and `logprobs`, the prompt alone is scored."""
    echo: bool | None = None
    """Start the answer with its prompt."""
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS), BeforeValidator(_no_logprobs)] = None
    prompt: Annotated[
        list[Prompt],
        BeforeValidator(_prompts),
        WithJsonSchema({"anyOf": [_TEXT, {**_PROMPTS, "items": _TEXT}, _IDS, {**_PROMPTS, "items": _IDS}]}),
    ]

    @property
    def num_top_logprobs(self) -> int | None:
        """Likeliest tokens to tell with each logprob; None: no logprobs."""
        return self.logprobs


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    unsupported: ClassVar[_Neutral] = {**_NEUTRAL, "echo": (None, False)}

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """OpenAI's newer name of `max_tokens`, and the one that counts when both are there."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Needs `logprobs`."""

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        return self

    @property
    def num_answer_tokens(self) -> int | None:
        """The most tokens to generate, if the client says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """Likeliest tokens to tell with each logprob; None: no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None
