"""The bodies of answers, field by field as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from bitllm.engine import outputs

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatLogprobs",
    "ChatResponse",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionResponse",
    "Delta",
    "DetokenizeResponse",
    "Embedding",
    "EmbeddingResponse",
    "EmbeddingUsage",
    "FunctionCall",
    "HealthResponse",
    "LoadFigures",
    "Message",
    "ModelCard",
    "ModelList",
    "ModelLoad",
    "PoolFigures",
    "PromptDetails",
    "StatsResponse",
    "TemplateResponse",
    "Timings",
    "TokenLogprob",
    "TokenPiece",
    "TokenizeResponse",
    "TokenizerInfo",
    "ToolCall",
    "TopLogprob",
    "Usage",
    "VersionResponse",
    "finish_reason",
    "timings_of",
    "usage_of",
]

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(msgspec.Struct):
    """Of the tokens of the prompt, those that the cache held."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(msgspec.Struct):
    """How long reading and writing took, as llama.cpp's server tells it; milliseconds."""

    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


class TopLogprob(msgspec.Struct):
    """A likely token and its natural log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the text, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry for each token of the text."""

    content: list[TokenLogprob]


class FunctionCall(msgspec.Struct):
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that the model asks for; `index` is there in streams only."""

    id: str
    function: FunctionCall
    type: str = "function"
    index: int | msgspec.UnsetType = msgspec.UNSET


class Message(msgspec.Struct):
    """An answer."""

    content: str | None
    role: str = "assistant"
    refusal: str | None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One of the `n` answers."""

    index: int
    message: Message
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatResponse(msgspec.Struct, kw_only=True):
    """The answer of /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    timings: Timings


class Delta(msgspec.Struct):
    """What a chunk adds to a message."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct):
    """A piece of one of the `n` answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """An event of a streamed chat."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


class CompletionLogprobs(msgspec.Struct):
    """Four lists of one entry a token; the first token of an echoed prompt has null for numbers."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One continuation: number `n` * (number of the prompt) + (number of the choice)."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionResponse(msgspec.Struct, kw_only=True):
    """The answer of /v1/completions, and an event of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


class Embedding(msgspec.Struct):
    """A vector as numbers, or as base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """Tokens of the inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(msgspec.Struct, kw_only=True):
    """The answer of /v1/embeddings."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(msgspec.Struct, kw_only=True):
    """A model that is served; context and `meta` are known once it is loaded."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "bitllm"
    status: Literal["loaded", "loading", "unloaded"]
    parent: str | None
    max_model_len: int | None
    meta: dict[str, Any]


class ModelList(msgspec.Struct, kw_only=True):
    """The answer of /v1/models."""

    object: str = "list"
    data: list[ModelCard]


class TokenPiece(msgspec.Struct):
    """A token and what it writes: text, or its bytes where they are no whole characters."""

    id: int
    piece: str | list[int]


class TokenizeResponse(msgspec.Struct):
    """The answer of /tokenize."""

    tokens: list[int | TokenPiece]
    count: int
    max_model_len: int


class DetokenizeResponse(msgspec.Struct):
    """The answer of /detokenize, under the names of llama.cpp and of vLLM."""

    content: str
    prompt: str


class TokenizerInfo(msgspec.Struct):
    """The answer of /tokenizer_info."""

    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    chat_template: str | None


class TemplateResponse(msgspec.Struct):
    """The answer of /apply-template."""

    prompt: str


class HealthResponse(msgspec.Struct):
    """The answer of /health."""

    status: str


class VersionResponse(msgspec.Struct):
    """The answer of /version."""

    version: str


class LoadFigures(msgspec.Struct):
    """What an engine holds; see `EngineStats`."""

    running: int
    waiting: int
    blocks: int
    used_blocks: int
    cached_blocks: int
    hit_rate: float
    steps: int
    prefilled_tokens: int
    decoded_tokens: int
    cached_tokens: int
    preemptions: int


class ModelLoad(msgspec.Struct):
    """A model, where it runs, and how busy it is."""

    id: str
    backend: str
    kernel: str
    threads: int
    context: int
    load: LoadFigures


class PoolFigures(msgspec.Struct):
    """Models that are loaded when they are asked for: the names of the others, and the budget.

    `unload_seconds` tells of loaded ones in how long they will be unloaded, unless used.
    """

    loading: list[str]
    unloaded: list[str]
    planned_bytes: int
    memory_limit: int | None
    unload_seconds: dict[str, float]


class StatsResponse(msgspec.Struct):
    """The answer of /stats; `loading` = the server has not begun to take requests."""

    version: str
    uptime_seconds: float
    draining: bool
    requests: int
    max_requests: int
    resident_bytes: int | None
    models: list[ModelLoad]
    loading: bool
    pool: PoolFigures | None


def finish_reason(reason: outputs.FinishReason) -> FinishReason:
    """Return OpenAI's word; a text that a timeout cut is as short as one that a limit cut."""
    return "stop" if reason == "stop" else "length"


def usage_of(prompts: list[list[outputs.Usage]]) -> Usage:
    """Return the tokens of a request.

    Args:
        prompts: for each prompt, the usage of each of its choices.
    """
    read = sum(choices[0].prompt_tokens for choices in prompts)
    written = sum(each.completion_tokens for choices in prompts for each in choices)
    cached = sum(choices[0].cached_tokens for choices in prompts)
    return Usage(read, written, read + written, PromptDetails(cached))


def timings_of(prompts: list[list[outputs.Usage]]) -> Timings:
    """Return the times of a request: those of the slowest sequence, tokens of all."""
    every = [each for choices in prompts for each in choices]
    usage = usage_of(prompts)
    reading = max(each.prefill_seconds for each in every)
    writing = max(each.decode_seconds for each in every)
    read = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
    drawn = usage.completion_tokens
    # The first token of a sequence comes with the end of its prompt.
    later = max(0, drawn - len(every))
    return Timings(
        prompt_n=read,
        prompt_ms=reading * 1e3,
        prompt_per_second=read / reading if reading > 0 else 0.0,
        predicted_n=drawn,
        predicted_ms=writing * 1e3,
        predicted_per_second=later / writing if writing > 0 else 0.0,
    )
