"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import msgspec
from starlette.responses import Response

from bitllm.config import SamplingParams
from bitllm.engine import outputs
from bitllm.engine.async_llm import ChunkStream
from bitllm.engine.prompt import Prompt
from bitllm.server.api_error import ApiError
from bitllm.server.call import FINGERPRINT, Call, TokenClock, json_response, response_id
from bitllm.server.event_stream import DONE, event
from bitllm.server.logprobs import completion_logprobs, echoed_logprobs
from bitllm.server.models import ServedModel
from bitllm.server.prompts import MOST_PROMPTS, read_prompts
from bitllm.server.requests import CompletionRequest
from bitllm.server.responses import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    finish_reason,
    timings_of,
)
from bitllm.server.sampling import check_logprobs, sampling_params
from bitllm.tokenizer import Tokenizer

__all__ = ["complete"]

_UNREAD = 64  # chunks of all prompts together that may wait to be sent


async def complete(call: Call, body: CompletionRequest) -> Response:
    """Continue one prompt, or several.

    Raises:
        ApiError, BitllmError: what is wrong with the request.
    """
    prompts = read_prompts(body.prompt, "prompt")
    params = _params(call, body)
    if len(prompts) * params.choices > MOST_PROMPTS:
        what = f"{len(prompts)} prompts with {params.choices} choices each are too many"
        raise ApiError(400, f"{what}; {MOST_PROMPTS} is the most of a request", param="n")
    served = await call.model(body.model)
    params = replace(params, adapter=served.adapter)
    tokenizer = served.llm.llm.tokenizer
    encoded = await asyncio.to_thread(_encode, prompts, tokenizer)
    if body.stream:
        streams = [served.llm.stream(ids, params=params) for ids in encoded]
        stack = await call.stack.enter_async_context(AsyncExitStack())
        for stream in streams:
            await stack.enter_async_context(stream)
            await stream.start()
        texts = await asyncio.to_thread(_echoes, body, prompts, tokenizer)
        return call.events(_Stream(call, body, served, params, streams, texts).events())
    completions = await served.llm.generate(encoded, params=params)
    usages = [[each.usage for each in completion.choices] for completion in completions]
    answer = CompletionResponse(
        id=response_id("cmpl"),
        created=call.created,
        model=served.name,
        choices=[],
        system_fingerprint=FINGERPRINT,
        usage=call.count(served.name, usages),
        timings=timings_of(usages),
    )

    def write() -> Response:
        answer.choices = _choices(body, tokenizer, prompts, encoded, completions)
        return json_response(answer)

    return await asyncio.to_thread(write)


def _params(call: Call, body: CompletionRequest) -> SamplingParams:
    if body.suffix:
        raise ApiError(400, "suffix is not supported: no model here fills in", param="suffix")
    check_logprobs("logprobs", body.logprobs)
    echoed = body.logprobs
    if body.echo:
        if body.stream and body.logprobs is not None:
            what = "echo with logprobs cannot be streamed"
            raise ApiError(400, what, param="echo", code="invalid_value")
        if body.max_tokens == 0:
            echoed = body.logprobs or 0
    return sampling_params(
        body,
        call.service.options.timeout,
        logprobs=body.logprobs,
        prompt_logprobs=echoed if body.echo else None,
    )


def _encode(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(each) if isinstance(each, str) else list(each) for each in prompts]


def _echoes(
    body: CompletionRequest, prompts: Sequence[Prompt], tokenizer: Tokenizer
) -> list[str] | None:
    """Return the text of each prompt, None where it is not to be echoed."""
    if not body.echo:
        return None
    return [
        each if isinstance(each, str) else tokenizer.decode(each, skip_special=False)
        for each in prompts
    ]


def _choices(
    body: CompletionRequest,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    encoded: Sequence[Sequence[int]],
    completions: Sequence[outputs.Completion],
) -> list[CompletionChoice]:
    texts = _echoes(body, prompts, tokenizer)
    choices: list[CompletionChoice] = []
    for number, completion in enumerate(completions):
        echo = "" if texts is None else texts[number]
        for each in completion.choices:
            told = _logprobs(body, tokenizer, encoded[number], each, echo)
            reason = finish_reason(each.finish_reason)
            choices.append(CompletionChoice(len(choices), echo + each.text, told, reason))
    return choices


def _logprobs(
    body: CompletionRequest,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    completion: outputs.Completion,
    echo: str,
) -> CompletionLogprobs | None:
    if body.logprobs is None:
        return None
    if body.echo:
        return echoed_logprobs(tokenizer, prompt_ids, completion, echo)
    return completion_logprobs(tokenizer, completion.logprobs or ())


class _Stream:
    """The events of streamed completions of one prompt or several, as they come."""

    def __init__(
        self,
        call: Call,
        body: CompletionRequest,
        served: ServedModel,
        params: SamplingParams,
        streams: list[ChunkStream],
        echoes: list[str] | None,
    ) -> None:
        self._call, self._served, self._params = call, served, params
        self._streams, self._echoes = streams, echoes
        self._clock = TokenClock(call, served.name)
        self._offsets = [0] * (len(streams) * params.n)
        self._usage_wanted = body.stream_options is not None and body.stream_options.include_usage
        self._chunk = CompletionResponse(
            id=response_id("cmpl"),
            created=call.created,
            model=served.name,
            choices=[],
            system_fingerprint=FINGERPRINT,
        )
        if self._usage_wanted:
            self._chunk.usage = None

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the encoded events."""
        usages: list[list[outputs.Usage]] = [[] for _ in self._streams]
        for number, text in enumerate(self._echoes or ()):
            for choice in range(self._params.n):
                yield self._event(CompletionChoice(number * self._params.n + choice, text))
        async for number, chunk in _merged(self._streams):
            self._clock.tick(chunk, number)
            if chunk.usage is not None:
                usages[number].append(chunk.usage)
            yield self._event(self._choice(number, chunk))
        usage = self._call.count(self._served.name, usages)
        if self._usage_wanted:
            self._chunk.choices, self._chunk.usage = [], usage
            self._chunk.timings = timings_of(usages)
            yield event(msgspec.json.encode(self._chunk))
        yield DONE

    def _choice(self, number: int, chunk: outputs.Chunk) -> CompletionChoice:
        index = number * self._params.n + chunk.index
        told = None
        if chunk.logprobs is not None:
            tokenizer = self._served.llm.llm.tokenizer
            told = completion_logprobs(tokenizer, chunk.logprobs, self._offsets[index])
            self._offsets[index] += sum(map(len, told.tokens))
        ended = chunk.finish_reason
        return CompletionChoice(
            index, chunk.text, told, None if ended is None else finish_reason(ended)
        )

    def _event(self, choice: CompletionChoice) -> bytes:
        self._chunk.choices = [choice]
        return event(msgspec.json.encode(self._chunk))


async def _merged(
    streams: Sequence[ChunkStream],
) -> AsyncGenerator[tuple[int, outputs.Chunk], None]:
    """Yield the chunks of several streams as they come, each with the number of its stream."""
    if len(streams) == 1:
        async for chunk in streams[0]:
            yield 0, chunk
        return
    waiting: asyncio.Queue[tuple[int, outputs.Chunk] | None] = asyncio.Queue(_UNREAD)

    async def read(number: int, stream: ChunkStream) -> None:
        async for chunk in stream:
            await waiting.put((number, chunk))

    async def read_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for number, stream in enumerate(streams):
                    group.create_task(read(number, stream))
        finally:
            await waiting.put(None)

    reading = asyncio.create_task(read_all())
    try:
        while (found := await waiting.get()) is not None:
            yield found
        await reading
    except* Exception as group:
        raise group.exceptions[0] from None
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
