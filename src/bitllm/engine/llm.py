"""`LLM`: a loaded model that people talk to."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Ordered
from dataclasses import replace
from itertools import chain
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack, cast, overload

from bitllm.backends.base import Decoder, DecoderInfo
from bitllm.checkpoint import ModelSpec
from bitllm.config import SamplingParams
from bitllm.engine.adapters import LoadedAdapter, find_adapter
from bitllm.engine.engine import Choices, Engine
from bitllm.engine.grammar import GrammarCompiler
from bitllm.engine.memory_plan import MemoryPlan
from bitllm.engine.outputs import Chunk, Completion, join_choices
from bitllm.engine.prompt import Message, Prompt, is_one, token_ids_of
from bitllm.engine.request import ModelDefaults, Request, describe_defaults, resolve_request
from bitllm.engine.sequence import Sequence
from bitllm.engine.speculation import Speculation
from bitllm.engine.stats import EngineStats
from bitllm.engine.token_access import TokenAccess
from bitllm.engine.tools import ToolChoice, constrain_call, read_tools, tool_prompt
from bitllm.errors import ConfigError
from bitllm.formats import open_adapter
from bitllm.tokenizer import StreamDetokenizer, Tokenizer

__all__ = [
    "AT_ONCE",
    "LLM",
    "Message",
    "Prompt",
    "SamplingOptions",
    "check_streams",
    "completion_of",
    "sampling_of",
]

AT_ONCE = 64
"""How many sequences of a long job are in the engine together."""


class SamplingOptions(TypedDict, total=False):
    """The keywords of `generate`, `stream` and `chat`: the fields of `SamplingParams`."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    seed: int | None
    stop: str | Ordered[str]
    stop_token_ids: Ordered[int]
    ignore_eos: bool
    min_tokens: int
    repetition_penalty: float | None
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int | None
    prompt_logprobs: int | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None
    choice: Ordered[str] | None
    n: int
    best_of: int | None
    priority: int
    timeout: float | None
    adapter: str | None


class LLM(TokenAccess):
    """A model ready to write; made by `bitllm.load`.

        llm = bitllm.load("microsoft/bitnet-b1.58-2B-4T")
        print(llm.generate("The capital of France is", max_tokens=20))
        for chunk in llm.stream("Once upon a time", temperature=0.8, seed=1):
            print(chunk, end="", flush=True)

    What is not set comes from the model's generation_config.json: see `SamplingParams`, and
    `repr(llm)` for what this model says. One `LLM` may be used from many threads; what they ask for
    runs together.

    Args:
        decoder: the loaded model; closed with this object.
        tokenizer: its tokenizer.
        name: what to call it.
        context: most tokens of prompt and output together.
        max_batch_tokens: most token rows of a step, as the decoder was loaded.
        defaults: what the model says about its own generation.
        plan: the memory budget it was loaded under, if one was made.
        prefix_cache: as in `EngineOptions`.
        device_reason: why it runs where it does, in words; "" = nobody says.
        speculation: decides which guesses at coming tokens are computed; None = none are.

    Attributes:
        name: as given.
        tokenizer: as given.
        context: as given.
        defaults: as given.
        plan: as given.
        device_reason: as given.
        spec: the architecture.
        info: what it runs on.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        name: str,
        context: int,
        max_batch_tokens: int,
        defaults: ModelDefaults | None = None,
        plan: MemoryPlan | None = None,
        prefix_cache: bool = True,
        device_reason: str = "",
        speculation: Speculation | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.context = context
        self.defaults = ModelDefaults() if defaults is None else defaults
        self.plan = plan
        self.device_reason = device_reason
        self.spec: ModelSpec = decoder.spec
        self.info: DecoderInfo = decoder.info
        self._grammars = GrammarCompiler(tokenizer, self.spec.vocab_size)
        self._engine = Engine(
            decoder,
            lambda: StreamDetokenizer(tokenizer),
            max_batch_tokens=max_batch_tokens,
            prefix_cache=prefix_cache,
            adapter_room=None if plan is None or plan.limit is None else plan.limit - plan.total,
            speculation=speculation,
        )

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]:
        """Continue a prompt, or several at once.

        Args:
            prompt: a text or its token ids; or a list of those.
            params: how to continue; single options override it.
            **options: fields of `SamplingParams`.

        Returns:
            A `Completion`; for a list of prompts, a list of them in the same order. With `n` above
            1, each is the first of its `choices`.

        Raises:
            ConfigError: an option that does not exist or is out of range, an empty prompt.
            ContextOverflowError: prompt and `max_tokens` do not fit; raised before any work.
        """
        sampling = sampling_of(params, options)
        if is_one(prompt):
            return self._complete([self.prepare(prompt, sampling)], sampling)[0]
        prompts = cast("list[Prompt]", prompt)
        return self._complete([self.prepare(each, sampling) for each in prompts], sampling)

    def __call__(
        self,
        prompt: Prompt,
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> str:
        """Continue one prompt and return the text alone; arguments and errors as in `generate`.

        So a model is a function from text to text, which is what frameworks take;
        `functools.partial(llm, max_tokens=64)` sets options for all calls.
        """
        if not is_one(prompt):
            raise ConfigError("a call takes one prompt", hint="use generate for a list of prompts")
        return self.generate(prompt, params=params, **options).text

    def stream(
        self,
        prompt: Prompt,
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Chunk]:
        """Continue a prompt, yielding text as it comes; arguments and errors as in `generate`.

        With `n` above 1, the chunks of all choices come as they are made; each says by its `index`
        where it belongs. Leaving the loop early frees what the sequences held. A `timeout` counts
        from this call on, whenever the first chunk is asked for.

        Raises:
            ConfigError: also where `best_of` is more than `n`: the best are known only at the end.
        """
        if not is_one(prompt):
            raise ConfigError("stream takes one prompt", hint="use generate for a list of prompts")
        sampling = sampling_of(params, options)
        check_streams(sampling)
        return self._chunks(self.prepare(prompt, sampling))

    @overload
    def chat(
        self,
        messages: str | Ordered[Message],
        *,
        stream: Literal[False] = False,
        tools: Ordered[Mapping[str, Any]] = (),
        tool_choice: ToolChoice = "auto",
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: str | Ordered[Message],
        *,
        stream: Literal[True],
        tools: Ordered[Mapping[str, Any]] = (),
        tool_choice: ToolChoice = "auto",
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Chunk]: ...

    def chat(
        self,
        messages: str | Ordered[Message],
        *,
        stream: bool = False,
        tools: Ordered[Mapping[str, Any]] = (),
        tool_choice: ToolChoice = "auto",
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | Iterator[Chunk]:
        """Answer a chat by the model's own template.

        Args:
            messages: the turns so far, each {"role": ..., "content": ...}; a text is one user turn.
            stream: yield `Chunk`s instead of returning a `Completion`.
            tools: functions the model may call, each {"type": "function", "function": {"name",
                "description", "parameters"}}; what it calls is in `tool_calls` of the result.
            tool_choice: "auto"; "none"; "required" = it must call one; or {"type": "function",
                "function": {"name": ...}} = it must call this one. A call it must make has
                arguments that fit their JSON schema, unless `max_tokens` cuts it short; one that it
                makes on its own is told as it was written, and its arguments are for you to check.
            params: how to answer; single options override it.
            **options: fields of `SamplingParams`.

        Raises:
            ChatTemplateError: the model has no chat template, or it refuses these messages.
            ConfigError, ContextOverflowError: as in `generate`.
        """
        sampling = sampling_of(params, options)
        request = self.prepare_chat(messages, sampling, tools, tool_choice)
        if not stream:
            return self._complete([request], sampling)[0]
        check_streams(sampling)
        return self._chunks(request)

    def prepare(
        self, prompt: Prompt, params: SamplingParams, *, fill_context: bool = False
    ) -> Request:
        """Return the request that a prompt and parameters mean for this model.

        Args:
            prompt: a text or its token ids.
            params: how to continue.
            fill_context: let `max_tokens`, where nobody gave it, be the rest of the context.

        Raises:
            ConfigError, ContextOverflowError: as in `generate`.
        """
        return resolve_request(
            token_ids_of(prompt, self.tokenizer),
            params,
            self.defaults,
            vocab_size=self.spec.vocab_size,
            context=self.context,
            fill_context=fill_context,
            grammar=self._grammars.compile(params),
            adapter=find_adapter(self._engine.adapters, params.adapter),
        )

    def prepare_chat(
        self,
        messages: str | Ordered[Message],
        params: SamplingParams,
        tools: Ordered[Mapping[str, Any]] = (),
        tool_choice: ToolChoice = "auto",
    ) -> Request:
        """Return the request for an answer to a chat; arguments and errors as in `chat`."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        callable_tools, forced = read_tools(tools, tool_choice)
        if forced:
            params = constrain_call(params, callable_tools, self.tokenizer)
        ids = tool_prompt(messages, callable_tools, self.tokenizer)
        request = self.prepare(ids, params, fill_context=True)
        names = frozenset(tool.name for tool in callable_tools)
        return replace(request, tool_names=names) if names else request

    def load_adapter(self, path: str | PathLike[str], name: str | None = None) -> str:
        """Load a low-rank adapter, for requests that ask for it by `adapter=name`.

        Requests with different adapters, and without, run in the same steps, and each writes what
        it would write alone. What an adapter takes counts against `memory_limit`.

        Args:
            path: a directory of PEFT, with adapter_config.json and adapter_model.safetensors.
            name: what requests will call it; None = the name of the directory.

        Returns:
            The name.

        Raises:
            ModelNotFoundError: there is no adapter.
            CheckpointError: its files are broken, of a kind that bitllm does not run, or made for
                another model.
            ConfigError: the name is in use.
            InsufficientMemoryError: it does not fit; raised before it is copied.
        """
        adapter = open_adapter(path)
        chosen = Path(adapter.origin).name if name is None else name
        self._engine.load_adapter(chosen, adapter)
        return chosen

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        The name is free at once. Requests that use the adapter go on with it to their end, and then
        its memory is freed.

        Raises:
            ConfigError: no adapter has this name.
        """
        self._engine.unload_adapter(name)

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The loaded adapters by name, as of now."""
        return self._engine.adapters

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return the token ids of a text, with the start token where the model has one."""
        return self.tokenizer.encode(text, add_bos=add_bos)

    def decode(self, token_ids: Ordered[int], *, skip_special: bool = True) -> str:
        """Return the text of token ids, without special tokens unless asked."""
        return self.tokenizer.decode([int(token) for token in token_ids], skip_special=skip_special)

    @property
    def engine(self) -> Engine:
        """What makes the steps; for code that drives it itself, as `AsyncLLM` does."""
        return self._engine

    @property
    def free_blocks(self) -> int:
        """KV blocks that nobody holds."""
        return self._engine.free_blocks

    def stats(self) -> EngineStats:
        """Return what the engine holds now and has done since the model was loaded."""
        return self._engine.stats()

    def close(self) -> None:
        """Free the model; it cannot be used afterwards. Closing twice is harmless."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._engine.closed else ""
        threads = "1 thread" if self.info.threads == 1 else f"{self.info.threads} threads"
        reason = f", {self.device_reason}" if self.device_reason else ""
        return (
            f"<LLM {self.name!r} on {self.info.backend} ({self.info.kernel}, {threads}){reason}, "
            f"context {self.context}, defaults: {describe_defaults(self.defaults)}, "
            f"stop_ids={sorted(self.defaults.stop_ids)}{state}>"
        )

    def _run(
        self, requests: Iterable[Request], *, at_once: int = AT_ONCE
    ) -> Generator[Sequence, None, None]:
        """Yield the finished sequences of these requests in their order, `at_once` on their way."""
        under_way: deque[Choices] = deque()
        coming = iter(requests)
        try:
            while True:
                for request in itertools.islice(coming, at_once - len(under_way)):
                    under_way.append(self._engine.add_choices(request))
                if not under_way:
                    return
                (sequence,) = under_way[0]
                self._engine.finish(sequence)
                yield sequence
                self._engine.abort(sequence)
                under_way.popleft()
        finally:
            for sequence in chain.from_iterable(under_way):
                self._engine.abort(sequence)

    def _complete(self, requests: list[Request], sampling: SamplingParams) -> list[Completion]:
        groups: list[Choices] = []
        try:
            for request in requests:
                groups.append(self._engine.add_choices(request))
            for sequence in chain.from_iterable(groups):
                self._engine.finish(sequence)
        finally:
            for sequence in chain.from_iterable(groups):
                self._engine.abort(sequence)
        return [completion_of(choices, sampling) for choices in groups]

    def _chunks(self, request: Request) -> Generator[Chunk, None, None]:
        return self._chunks_since(request, self._engine.now())

    def _chunks_since(self, request: Request, called: float) -> Generator[Chunk, None, None]:
        choices = self._engine.add_choices(request, called)
        try:
            while (chunk := self._engine.next_chunk(*choices)) is not None:
                yield chunk
        finally:
            for sequence in choices:
                self._engine.abort(sequence)


def completion_of(choices: Ordered[Sequence], sampling: SamplingParams) -> Completion:
    """Return the result of the finished choices of a request."""
    completions = [each.completion() for each in choices]
    return join_choices(completions, sampling.n, logprobs=sampling.logprobs is not None)


def check_streams(sampling: SamplingParams) -> None:
    """Refuse to stream what is known only at the end.

    Raises:
        ConfigError: more choices are to be computed than returned.
    """
    if sampling.choices > sampling.n:
        raise ConfigError(
            f"best_of={sampling.choices} with n={sampling.n} cannot be streamed: "
            "which are the best is known only at the end",
            hint="leave best_of out, or use generate",
        )


def sampling_of(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """Return `params` (None = all defaults) with single options set.

    Raises:
        ConfigError: an option that does not exist or is out of range.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise ConfigError(f"params must be SamplingParams, got {params!r}")
    return SamplingParams.from_options(options, params)
