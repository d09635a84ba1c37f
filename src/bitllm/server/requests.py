"""The bodies of requests as msgspec reads and checks them; fields not named here are ignored.

Ranges are checked by `SamplingParams`, where the command line and the Python API are checked, too.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

__all__ = [
    "ApplyTemplateRequest",
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "ContentPart",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "GenerationRequest",
    "JsonSchemaFormat",
    "ResponseFormat",
    "StreamOptions",
    "TokenizeRequest",
]


class StreamOptions(msgspec.Struct):
    """What a stream tells besides its text."""

    include_usage: bool = False


class JsonSchemaFormat(msgspec.Struct):
    """A JSON schema and its name; `strict` changes nothing, the schema always holds."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema: dict[str, Any] | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both kinds of generation take; null means the default of the model."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | list[tuple[int, float]] | None = None
    n: int | None = None
    best_of: int | None = None
    priority: int | None = None
    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None


class ContentPart(msgspec.Struct):
    """A part of a message; `type` must be "text"."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions; a prompt is a text or token ids, or a list of those."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings; an input is a text or token ids, or a list of those."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a text as `content` or `prompt`, or a chat as `messages`.

    `add_special` and `add_special_tokens` say whether the start token is put in front: by default
    not where the text is called `content`, and yes where it is called `prompt`.
    """

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    with_pieces: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class ApplyTemplateRequest(msgspec.Struct, kw_only=True):
    """POST /apply-template."""

    messages: list[ChatMessage]
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
