"""The table of endpoints, of which the routes and /openapi.json are made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response

from bitllm.server import status
from bitllm.server.call import Call
from bitllm.server.chat import chat
from bitllm.server.completions import complete
from bitllm.server.embeddings import embed
from bitllm.server.requests import (
    ApplyTemplateRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from bitllm.server.responses import (
    ChatResponse,
    CompletionResponse,
    DetokenizeResponse,
    EmbeddingResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    StatsResponse,
    TemplateResponse,
    TokenizeResponse,
    TokenizerInfo,
    VersionResponse,
)
from bitllm.server.tokens import apply_template, detokenize, tokenize, tokenizer_info

__all__ = ["ENDPOINTS", "Endpoint"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is answered at a path.

    Attributes:
        method: of HTTP.
        paths: the documented one, then other names of it.
        handler: gets the request and its body, and returns the answer.
        answer: struct of the answer; None = text for Prometheus.
        summary: one line for the documentation.
        body: struct of the request; None = it has none.
        public: answered without a key.
        streams: may be answered by an event stream.
    """

    method: str
    paths: tuple[str, ...]
    handler: Callable[[Call, Any], Awaitable[Response]]
    answer: type[msgspec.Struct] | None
    summary: str
    body: type[msgspec.Struct] | None = None
    public: bool = False
    streams: bool = False


ENDPOINTS = (
    Endpoint(
        "POST",
        ("/v1/chat/completions", "/chat/completions"),
        chat,
        ChatResponse,
        "Answer a chat.",
        ChatRequest,
        streams=True,
    ),
    Endpoint(
        "POST",
        ("/v1/completions", "/completions"),
        complete,
        CompletionResponse,
        "Continue a text.",
        CompletionRequest,
        streams=True,
    ),
    Endpoint(
        "POST",
        ("/v1/embeddings", "/embeddings"),
        embed,
        EmbeddingResponse,
        "Turn texts into vectors.",
        EmbeddingRequest,
    ),
    Endpoint("GET", ("/v1/models", "/models"), status.list_models, ModelList, "List the models."),
    Endpoint(
        "GET",
        ("/v1/models/{model:path}", "/models/{model:path}"),
        status.show_model,
        ModelCard,
        "Show one model.",
    ),
    Endpoint(
        "POST",
        ("/tokenize",),
        tokenize,
        TokenizeResponse,
        "Turn a text or a chat into token ids.",
        TokenizeRequest,
    ),
    Endpoint(
        "POST",
        ("/detokenize",),
        detokenize,
        DetokenizeResponse,
        "Turn token ids into text.",
        DetokenizeRequest,
    ),
    Endpoint(
        "POST",
        ("/apply-template",),
        apply_template,
        TemplateResponse,
        "Write a chat as the prompt it becomes.",
        ApplyTemplateRequest,
    ),
    Endpoint("GET", ("/tokenizer_info",), tokenizer_info, TokenizerInfo, "Describe the tokenizer."),
    Endpoint(
        "GET",
        ("/health", "/v1/health"),
        status.health,
        HealthResponse,
        "Tell whether requests are taken.",
        public=True,
    ),
    Endpoint(
        "GET", ("/version",), status.version, VersionResponse, "Tell the version.", public=True
    ),
    Endpoint("GET", ("/stats",), status.stats, StatsResponse, "Tell how busy the server is."),
    Endpoint("GET", ("/metrics",), status.metrics, None, "Tell figures to Prometheus."),
)
