"""A generation with every question answered: the user's parameters over the model's defaults."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from bitllm.backends.base import OutputKind
from bitllm.config import SamplingParams
from bitllm.engine.adapters import LoadedAdapter
from bitllm.engine.grammar import Grammar
from bitllm.engine.readout import Readout
from bitllm.errors import ConfigError, ContextOverflowError

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "ModelDefaults",
    "Request",
    "adapted",
    "describe_defaults",
    "readout_request",
    "resolve_request",
]

_Value = TypeVar("_Value")

READING_PRIORITY = 1
"""Of requests that read a text: files are read as a whole; who waits for an answer goes first."""

DEFAULT_MAX_TOKENS = 256
"""What `max_tokens` means for a prompt where neither user nor model say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDefaults:
    """What a model says about its own generation; see `SamplingParams` for the fields.

    Attributes:
        stop_ids: ids that end a generation.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it; nothing here is left open.

    Attributes:
        prompt_ids: at least one id.
        stop_ids: ids that end the generation.
        banned_ids: ids that are not drawn before `min_tokens`.
        max_tokens: 0 = nothing is drawn; then there is a `readout`.
        top_logprobs: -1 = no log-probabilities, else how many of the likeliest ids.
        readout: what is wanted of the prompt itself.
        grammar: the form of the text, None = free.
        tool_names: functions whose calls are looked for in the text.
        choices: how many completions are computed, each with draws of its own.
        adapter: what is added to the products of the model, None = nothing.
        prefix_key: what keys and values depend on besides the tokens, such as an adapter; blocks
            of the cache are shared among equal keys only.
        prefix_cache: whether the beginning of the prompt may come from the cache instead of being
            computed.

    The rest is as in `SamplingParams`.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    banned_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = -1
    readout: Readout | None = None
    grammar: Grammar | None = None
    tool_names: frozenset[str] = frozenset()
    choices: int = 1
    priority: int = 0
    timeout: float | None = None
    adapter: LoadedAdapter | None = None
    prefix_key: bytes = b""
    prefix_cache: bool = True

    @property
    def penalised(self) -> bool:
        """Whether the ids seen so far change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )


def resolve_request(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    defaults: ModelDefaults,
    *,
    vocab_size: int,
    context: int,
    fill_context: bool = False,
    grammar: Grammar | None = None,
    adapter: LoadedAdapter | None = None,
) -> Request:
    """Return the request that these parameters mean for this model.

    Args:
        prompt_ids: token ids of the prompt.
        params: what the user said.
        defaults: what the model says.
        vocab_size: ids are 0 .. vocab_size - 1.
        context: most tokens of prompt and output together.
        fill_context: let `max_tokens`, where nobody gave it, be the rest of the context.
        grammar: what `params` say about the form of the text, compiled.
        adapter: the one that `params` name.

    Raises:
        ConfigError: an empty prompt, or an id outside the vocabulary.
        ContextOverflowError: prompt and `max_tokens` do not fit into the context.
    """
    _check_ids("the prompt", prompt_ids, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", list(params.logit_bias), vocab_size)
    if not prompt_ids:
        raise ConfigError(
            "the prompt has no tokens", hint="give some text; this model adds no start token"
        )
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and count > vocab_size:
            raise ConfigError(f"{name} is {count}, but there are only {vocab_size} tokens")
    temperature = _or(params.temperature, defaults.temperature)
    own_stops = () if params.ignore_eos else (i for i in defaults.stop_ids if i < vocab_size)
    stop_ids = frozenset(params.stop_token_ids).union(own_stops)
    request = Request(
        prompt_ids=tuple(prompt_ids),
        max_tokens=_fit(len(prompt_ids), params, defaults, context, fill_context),
        temperature=temperature,
        top_k=_or(params.top_k, defaults.top_k),
        top_p=_or(params.top_p, defaults.top_p),
        min_p=_or(params.min_p, defaults.min_p),
        typical_p=_or(params.typical_p, defaults.typical_p),
        seed=_seed(params.seed) if temperature > 0 else 0,
        stop_strings=params.stop_strings,
        stop_ids=stop_ids,
        banned_ids=stop_ids if params.min_tokens else frozenset(),
        min_tokens=params.min_tokens,
        repetition_penalty=_or(params.repetition_penalty, defaults.repetition_penalty),
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=params.logit_bias,
        readout=_prompt_readout(prompt_ids, params.prompt_logprobs),
        grammar=grammar,
        top_logprobs=_top_logprobs(params),
        choices=params.choices,
        priority=params.priority,
        timeout=params.timeout,
    )
    return adapted(request, adapter)


def adapted(request: Request, adapter: LoadedAdapter | None) -> Request:
    """Return a request with an adapter, as it is for None."""
    if adapter is None:
        return request
    return dataclasses.replace(request, adapter=adapter, prefix_key=adapter.key)


def readout_request(
    token_ids: Sequence[int], readout: Readout, vocab_size: int, context: int
) -> Request:
    """Return the request that reads rows of a text and writes nothing.

    Args:
        token_ids: the text.
        readout: which rows, and what of them.
        vocab_size: ids are 0 .. vocab_size - 1.
        context: most tokens of a text.

    Raises:
        ConfigError: no tokens, or an id outside the vocabulary.
        ContextOverflowError: the text does not fit into the context.
    """
    if not token_ids:
        raise ConfigError("the text has no tokens", hint="this model adds no start token")
    _check_ids("the text", token_ids, vocab_size)
    _check_ids("the continuation", readout.targets, vocab_size)
    if len(token_ids) > context:
        raise ContextOverflowError(
            f"the text has {len(token_ids)} tokens, but the context holds {context}",
            hint="shorten the text, or load the model with a larger context",
        )
    return Request(
        prompt_ids=tuple(token_ids), max_tokens=0, readout=readout, priority=READING_PRIORITY
    )


def describe_defaults(defaults: ModelDefaults) -> str:
    """Return the defaults that are not neutral as "temperature=0.6, top_p=0.9"."""
    neutral = ModelDefaults()
    parts = [f"temperature={defaults.temperature:g}"]
    for item in dataclasses.fields(defaults):
        value = getattr(defaults, item.name)
        if item.name not in ("temperature", "stop_ids") and value != getattr(neutral, item.name):
            parts.append(f"{item.name}={value:g}")
    return ", ".join(parts)


def _prompt_readout(prompt_ids: Sequence[int], top_n: int | None) -> Readout | None:
    if top_n is None:
        return None
    targets = tuple(prompt_ids[1:])
    return Readout(OutputKind.SCORE, 0, len(targets), targets, top_n)


def _top_logprobs(params: SamplingParams) -> int:
    if params.logprobs is not None:
        return params.logprobs
    return 0 if params.choices > params.n else -1  # the best are found by them


def _or(value: _Value | None, default: _Value) -> _Value:
    return default if value is None else value


def _seed(seed: int | None) -> int:
    return int.from_bytes(os.urandom(8), "little") if seed is None else seed


def _check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"{what}: token id {token} is outside the vocabulary",
                hint=f"ids of this model are 0 to {vocab_size - 1}",
            )


def _fit(
    prompt: int, params: SamplingParams, defaults: ModelDefaults, context: int, fill: bool
) -> int:
    """Return `max_tokens`, or raise where the context does not hold prompt and output."""
    room = context - prompt
    wanted = params.max_tokens
    needed = max(1, params.min_tokens) if wanted is None else wanted
    if room < needed:
        asked = f"max_tokens={needed}" if wanted is not None else f"at least {needed} more"
        raise ContextOverflowError(
            f"the prompt has {prompt} tokens; with {asked} that is {prompt + needed}, "
            f"but the context holds {context}",
            hint=_way_out(room, needed),
        )
    if wanted is not None:
        return wanted
    default = room if fill else DEFAULT_MAX_TOKENS
    return max(needed, min(room, _or(defaults.max_tokens, default)))


def _way_out(room: int, needed: int) -> str:
    if room >= 1 and needed > 1:
        return f"max_tokens can be {room} at most here; or load the model with a larger context"
    return "shorten the prompt, or load the model with a larger context"
