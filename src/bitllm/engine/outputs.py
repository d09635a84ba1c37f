"""What a generation gives back: `Completion`, and `Chunk` by `Chunk` while it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = [
    "Chunk",
    "Completion",
    "FinishReason",
    "Score",
    "TextScore",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "join_choices",
]

FinishReason = Literal["stop", "length", "timeout"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one generated token, by the model's own distribution.

    Attributes:
        token_id: the token.
        logprob: its natural log-probability, before bias, penalties, temperature and cuts.
        top: (token id, log-probability) of the likeliest tokens, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is after its prompt.

    Attributes:
        logprob: natural log-probability of all of its tokens together.
        greedy: whether each of its tokens is the likeliest at its place.
        tokens: one entry for each of its tokens.
    """

    logprob: float
    greedy: bool
    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class TextScore:
    """How well a model foresees a text; each token but the first is scored once.

    Attributes:
        logprob: natural log-probability of all scored tokens together.
        squares: sum of the squares of their log-probabilities.
        tokens: how many were scored.
        text_bytes: bytes of UTF-8 that they stand for; None where only token ids were given.
    """

    logprob: float
    squares: float
    tokens: int
    text_bytes: int | None

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability of a token; may be infinite."""
        return _exp(-self.logprob / self.tokens)

    @property
    def perplexity_error(self) -> float:
        """Standard error of `perplexity`, as if the tokens were drawn independently; 0 for one."""
        if self.tokens < 2:
            return 0.0
        mean = self.logprob / self.tokens
        variance = max(0.0, self.squares / self.tokens - mean * mean)
        return self.perplexity * math.sqrt(variance / (self.tokens - 1))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that coding a byte of the text takes; None without a text."""
        return -self.logprob / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def byte_perplexity(self) -> float | None:
        """Perplexity of a byte, which vocabularies can be compared by; None without a text."""
        return _exp(-self.logprob / self.text_bytes) if self.text_bytes else None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants to have called.

    Attributes:
        name: one of the names that were given.
        arguments: as the model wrote them; checked against the schema only where the call was
            forced.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and time of one generation.

    Sequences that run in the same steps share that time: each reports all of it.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, a stop id included.
        prefill_seconds: from the first step of this sequence to its first token.
        decode_seconds: from its first token to its last.
        cached_tokens: of the prompt, those whose keys and values were in the cache already.
        drafted_tokens: guesses at coming tokens that were computed along with a known one.
        accepted_tokens: those that were right, and so saved a step each.
    """

    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of reading the prompt; 0 where no time passed."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of writing, after the first token; 0 for fewer than two tokens."""
        written = self.completion_tokens - 1
        return written / self.decode_seconds if written > 0 and self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuation of a prompt; `str()` of it is its text.

    Attributes:
        text: the text, without stop string or stop id.
        token_ids: every id generated, the stop id and the ids of a stop string included.
        finish_reason: "stop" at a stop id or stop string, "length" at max_tokens, "timeout" when
            its time was up.
        usage: tokens and time of this text.
        seed: seed of the draws, also where none was given; None at temperature 0.
        logprobs: one entry for each of `token_ids`, or None if not asked for.
        prompt_logprobs: one entry for each token of the prompt but the first, which nothing comes
            before; fewer where a timeout came first, None if not asked for.
        tool_calls: the calls in the text, where `chat` was given tools.
        index: which completion of its prompt this is: a seed has the same text for an index
            however many are asked for.
        alternatives: the other completions of the prompt, where `n` is more than 1.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    seed: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    index: int = 0
    alternatives: tuple[Completion, ...] = ()

    @property
    def choices(self) -> tuple[Completion, ...]:
        """All completions of the prompt, this one first: by index, or the best first."""
        return (self, *self.alternatives)

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of a token, by `logprobs`; -inf where there are none."""
        if not self.logprobs:
            return -math.inf
        return math.fsum(each.logprob for each in self.logprobs) / len(self.logprobs)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next piece of a streamed completion; `str()` of it is its text.

    The pieces of one index joined give its `Completion`. Text comes in whole characters, and what
    could still become a stop string is held back until it cannot.

    Attributes:
        text: new text; empty only in the last chunk.
        token_ids: ids generated since the chunk before.
        finish_reason: why the text ended; None in all chunks but the last.
        usage: tokens and time, in the last chunk.
        seed: as in `Completion`, in the last chunk.
        logprobs: one entry for each of `token_ids`, or None if not asked for.
        prompt_logprobs: as in `Completion`, in the last chunk.
        tool_calls: as in `Completion`, in the last chunk.
        index: which completion of the prompt this is a piece of.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    seed: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    index: int = 0

    def __str__(self) -> str:
        return self.text


def join_choices(completions: Sequence[Completion], n: int, *, logprobs: bool) -> Completion:
    """Return the first of the `n` best completions of a prompt, the others its alternatives.

    Args:
        completions: all of them, by index; more than `n` only if each has its log-probabilities.
        n: how many are wanted. Where there are more, those of the highest `mean_logprob` are
            taken, the lowest index winning a tie.
        logprobs: whether the result shows log-probabilities.
    """
    best = list(completions)
    if len(best) > n:
        best = sorted(best, key=lambda each: -each.mean_logprob)[:n]
    if not logprobs:
        best = [replace(each, logprobs=None) for each in best]
    return replace(best[0], alternatives=tuple(best[1:])) if len(best) > 1 else best[0]


def _exp(exponent: float) -> float:
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf
