"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from starlette.responses import Response

from bitllm.config import SamplingParams
from bitllm.engine import outputs
from bitllm.engine.async_llm import ChunkStream
from bitllm.server.api_error import ApiError
from bitllm.server.call import FINGERPRINT, Call, TokenClock, json_response, response_id
from bitllm.server.event_stream import DONE, event
from bitllm.server.held_calls import HeldCalls, text_beside_calls
from bitllm.server.logprobs import chat_logprobs
from bitllm.server.models import ServedModel
from bitllm.server.requests import ChatMessage, ChatRequest
from bitllm.server.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatResponse,
    Delta,
    FunctionCall,
    Message,
    TokenLogprob,
    ToolCall,
    finish_reason,
    timings_of,
)
from bitllm.server.sampling import check_logprobs, sampling_params

__all__ = ["chat", "messages_of"]


async def chat(call: Call, body: ChatRequest) -> Response:
    """Answer a chat.

    Raises:
        ApiError, BitllmError: what is wrong with the request.
    """
    messages = messages_of(body.messages)
    params = _params(call, body)
    served = await call.model(body.model)
    params = replace(params, adapter=served.adapter)
    asked: dict[str, Any] = {
        "params": params,
        "tools": body.tools or (),
        "tool_choice": _tool_choice(body),
    }
    if body.stream:
        stream = served.llm.chat(messages, stream=True, **asked)
        await stream.start()
        return call.events(_Stream(call, body, served, params, stream).events())
    completion = await served.llm.chat(messages, **asked)
    usages = [[each.usage for each in completion.choices]]
    return json_response(
        ChatResponse(
            id=response_id("chatcmpl"),
            created=call.created,
            model=served.name,
            choices=[
                _choice(index, each, body, served, params)
                for index, each in enumerate(completion.choices)
            ],
            usage=call.count(served.name, usages),
            system_fingerprint=FINGERPRINT,
            timings=timings_of(usages),
        )
    )


def messages_of(messages: Sequence[ChatMessage]) -> list[Mapping[str, Any]]:
    """Return messages as chat templates read them.

    Raises:
        ApiError: 400, no message, or a part of one that is no text.
    """
    if not messages:
        raise ApiError(400, "messages is empty", param="messages", code="invalid_value")
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: ChatMessage) -> Mapping[str, Any]:
    """Join the parts of a message, and give calls their arguments as templates want them."""
    told: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(index, message),
    }
    for key in ("name", "tool_call_id"):
        if (value := getattr(message, key)) is not None:
            told[key] = value
    if message.tool_calls:
        told["tool_calls"] = [_call(call) for call in message.tool_calls]
    return told


def _text(index: int, message: ChatMessage) -> str:
    if not isinstance(message.content, list):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            where = f"messages[{index}].content"
            raise ApiError(400, f"{where} is missing", param=where, code="missing_value")
        return message.content or ""
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            where = f"messages[{index}].content[{number}]"
            what = f"{where} is of type {part.type!r:.80}, but this model reads text only"
            raise ApiError(400, what, param=where, code="invalid_value")
    return "\n".join(part.text or "" for part in message.content)


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call with its arguments as an object: templates write them as JSON themselves."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _params(call: Call, body: ChatRequest) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    check_logprobs("top_logprobs", body.top_logprobs)
    return sampling_params(
        body,
        call.service.options.timeout,
        max_tokens=body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _tool_choice(body: ChatRequest) -> str | dict[str, Any]:
    return "auto" if body.tool_choice is None else body.tool_choice


def _choice(
    index: int,
    completion: outputs.Completion,
    body: ChatRequest,
    served: ServedModel,
    params: SamplingParams,
) -> ChatChoice:
    message = Message(completion.text)
    reason = finish_reason(completion.finish_reason)
    if completion.tool_calls:
        message = Message(text_beside_calls(completion.text))
        message.tool_calls = _calls(completion.tool_calls, body)
        reason = "tool_calls" if reason == "stop" else reason
    ended_by = _end_id(completion.finish_reason, completion.token_ids, served, params)
    told = chat_logprobs(served.llm.llm.tokenizer, completion.logprobs, ended_by)
    return ChatChoice(index, message, reason, told)


def _calls(calls: Sequence[outputs.ToolCall], body: ChatRequest) -> list[ToolCall]:
    most = 1 if body.parallel_tool_calls is False else len(calls)
    return [
        ToolCall(
            f"call_{uuid.uuid4().hex[:24]}",
            FunctionCall(each.name, json.dumps(each.arguments, ensure_ascii=False)),
        )
        for each in calls[:most]
    ]


def _end_id(
    reason: outputs.FinishReason | None,
    token_ids: Sequence[int],
    served: ServedModel,
    params: SamplingParams,
) -> int | None:
    """Return the stop id that ended a text, which is no part of it."""
    if reason != "stop" or not token_ids:
        return None
    stops = served.llm.llm.defaults.stop_ids.union(params.stop_token_ids)
    return token_ids[-1] if token_ids[-1] in stops else None


class _Stream:
    """The events of a streamed answer: role, text, calls, the end of each choice, usage, DONE."""

    def __init__(
        self,
        call: Call,
        body: ChatRequest,
        served: ServedModel,
        params: SamplingParams,
        stream: ChunkStream,
    ) -> None:
        self._call, self._body, self._served, self._params = call, body, served, params
        self._stream = stream
        self._clock = TokenClock(call, served.name)
        self._usage_wanted = body.stream_options is not None and body.stream_options.include_usage
        forced = isinstance(body.tool_choice, dict) or body.tool_choice == "required"
        self._held = (
            [HeldCalls(forced=forced) for _ in range(params.n)]
            if body.tools and body.tool_choice != "none"
            else None
        )
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(params.n)]
        self._chunk = ChatChunk(
            id=response_id("chatcmpl"),
            created=call.created,
            model=served.name,
            choices=[],
            system_fingerprint=FINGERPRINT,
        )
        if self._usage_wanted:
            self._chunk.usage = None

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the encoded events."""
        usages: list[outputs.Usage] = []
        async with self._stream:
            for index in range(self._params.n):
                yield self._event(index, Delta(role="assistant", content=""))
            async for chunk in self._stream:
                self._clock.tick(chunk)
                if chunk.usage is None:
                    for piece in self._text(chunk):
                        yield piece
                else:
                    usages.append(chunk.usage)
                    for piece in self._end(chunk):
                        yield piece
        usage = self._call.count(self._served.name, [usages])
        if self._usage_wanted:
            self._chunk.choices, self._chunk.usage = [], usage
            self._chunk.timings = timings_of([usages])
            yield event(msgspec.json.encode(self._chunk))
        yield DONE

    def _text(self, chunk: outputs.Chunk) -> list[bytes]:
        """Return the event of a piece of text; none while it may be a call."""
        self._note_logprobs(chunk)
        shown = chunk.text
        if self._held is not None:
            shown = self._held[chunk.index].push(chunk.text)
        if not shown:
            return []
        return [self._event(chunk.index, Delta(content=shown), self._take_logprobs(chunk.index))]

    def _end(self, chunk: outputs.Chunk) -> list[bytes]:
        """Return the events at the end of a choice."""
        events = self._text(chunk)
        reason = finish_reason(chunk.finish_reason or "stop")
        if chunk.tool_calls:
            calls = _calls(chunk.tool_calls, self._body)
            for number, each in enumerate(calls):
                each.index = number
            events.append(self._event(chunk.index, Delta(tool_calls=calls)))
            reason = "tool_calls" if reason == "stop" else reason
        elif self._held is not None and (rest := self._held[chunk.index].rest()):
            told = self._take_logprobs(chunk.index)
            events.append(self._event(chunk.index, Delta(content=rest), told))
        told = self._take_logprobs(chunk.index)
        events.append(self._event(chunk.index, Delta(), told, reason))
        return events

    def _note_logprobs(self, chunk: outputs.Chunk) -> None:
        if chunk.logprobs is not None:
            ended_by = _end_id(chunk.finish_reason, chunk.token_ids, self._served, self._params)
            told = chat_logprobs(self._served.llm.llm.tokenizer, chunk.logprobs, ended_by)
            self._logprobs[chunk.index] += told.content if told is not None else []

    def _take_logprobs(self, index: int) -> ChatLogprobs | None:
        found = self._logprobs[index]
        self._logprobs[index] = []
        return ChatLogprobs(found) if found else None

    def _event(
        self,
        index: int,
        delta: Delta,
        logprobs: ChatLogprobs | None = None,
        reason: Any = None,
    ) -> bytes:
        self._chunk.choices = [ChatChunkChoice(index, delta, logprobs, reason)]
        return event(msgspec.json.encode(self._chunk))
