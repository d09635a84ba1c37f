"""Token-level access as requests of the engine: scores, perplexity, logits and embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import OutputKind
from bitllm.checkpoint import ModelSpec
from bitllm.config import as_integer
from bitllm.engine.outputs import Score, TextScore, TokenLogprob
from bitllm.engine.readout import Readout
from bitllm.engine.request import Request, readout_request
from bitllm.errors import CheckpointError, ConfigError
from bitllm.tokenizer import Tokenizer

__all__ = [
    "Pooling",
    "check_pooling",
    "hidden_request",
    "logits_request",
    "pool",
    "score_of",
    "score_request",
    "scored_bytes",
    "text_score_of",
    "windows",
]

F32 = npt.NDArray[np.float32]

Pooling = Literal["mean", "last"]
"""One vector for a text: the mean of the hidden states of its tokens, or that of the last one."""


def score_request(
    prompt: Sequence[int], continuation: Sequence[int], top_n: int, spec: ModelSpec, context: int
) -> Request:
    """Return the request for the log-probabilities of `continuation` after `prompt`.

    Raises:
        ConfigError: no prompt or no continuation, an id outside the vocabulary.
        ContextOverflowError: together they do not fit into the context.
    """
    if not prompt:
        raise ConfigError(
            "the prompt has no tokens, and nothing is known of a token that nothing comes before",
            hint="give some text; this model adds no start token",
        )
    if not continuation:
        raise ConfigError("the continuation has no tokens: there is nothing to score")
    as_integer("top", top_n, low=0, high=spec.vocab_size)
    readout = Readout(
        OutputKind.SCORE,
        start=len(prompt) - 1,
        count=len(continuation),
        targets=tuple(continuation),
        top_n=max(1, top_n),  # whether a token is the likeliest is always told
    )
    # The last token is scored by the row before it; its own row is not needed.
    return readout_request([*prompt, *continuation[:-1]], readout, spec.vocab_size, context)


def score_of(tokens: tuple[TokenLogprob, ...], top_n: int) -> Score:
    """Return the result of a `score_request`."""
    return Score(
        logprob=math.fsum(token.logprob for token in tokens),
        greedy=all(token.top[0][0] == token.token_id for token in tokens),
        tokens=tuple(
            TokenLogprob(token.token_id, token.logprob, token.top[:top_n]) for token in tokens
        ),
    )


def windows(
    token_ids: Sequence[int], window: int, stride: int | None, spec: ModelSpec, context: int
) -> Iterator[Request]:
    """Yield requests that score every token but the first exactly once.

    Each window begins `stride` tokens (None = half a window) after the one before and scores what
    that one did not reach.

    Raises:
        ConfigError: fewer than two tokens, or a window or stride out of range.
    """
    as_integer("context", window, low=2, high=context)
    stride = window // 2 if stride is None else stride
    as_integer("stride", stride, low=1, high=window - 1)
    if len(token_ids) < 2:
        raise ConfigError(f"perplexity needs two tokens or more, got {len(token_ids)}")
    done = 1  # tokens scored so far; nothing is known of the first
    for start in range(0, len(token_ids), stride):
        end = min(start + window, len(token_ids))
        yield score_request(token_ids[start:done], token_ids[done:end], 0, spec, context)
        done = end
        if end == len(token_ids):
            return


def text_score_of(
    logprobs: Iterable[F32],
    text_bytes: int | None,
    progress: Callable[[int], None] | None = None,
) -> TextScore:
    """Return what the log-probabilities of the tokens of a text, given in pieces, come to.

    Args:
        logprobs: the pieces, each float32 [tokens].
        text_bytes: bytes of UTF-8 that these tokens stand for, or None if there is no text.
        progress: told how many tokens have been scored, after each piece.
    """
    total, squares, count = 0.0, 0.0, 0
    for piece in logprobs:
        total += float(piece.sum(dtype=np.float64))
        squares += float(np.square(piece, dtype=np.float64).sum())
        count += len(piece)
        if progress is not None:
            progress(count)
    return TextScore(total, squares, count, text_bytes)


def scored_bytes(
    text: str, token_ids: Sequence[int], limit: int | None, tokenizer: Tokenizer
) -> int:
    """Return how many bytes of a text its tokens but the first stand for.

    The first is a start token, which stands for none, or is not scored. Where tokens hold parts of
    a character, one that the first begins is left out, and so is one that a limit cuts.

    Args:
        text: the text.
        token_ids: its tokens, up to the limit.
        limit: None = they are all there.
        tokenizer: what made them.
    """
    if limit is not None:
        text = tokenizer.decode(token_ids).rstrip("\ufffd")
    return len(text.encode()) - len(tokenizer.decode(token_ids[:1]).encode())


def logits_request(token_ids: Sequence[int], start: int, spec: ModelSpec, context: int) -> Request:
    """Return the request for the logits of the rows from `start` on.

    Raises:
        ConfigError: no tokens, an id outside the vocabulary, or `start` beyond the last.
        ContextOverflowError: they do not fit into the context.
    """
    as_integer("start", start, low=0, high=max(0, len(token_ids) - 1))
    readout = Readout(OutputKind.LOGITS, start=start, count=len(token_ids) - start)
    return readout_request(token_ids, readout, spec.vocab_size, context)


def check_pooling(pooling: Pooling | None, spec: ModelSpec) -> Pooling:
    """Return how a model's hidden states become one vector.

    Raises:
        ConfigError: an unknown word, or none where the model says nothing itself.
    """
    if pooling is not None and pooling not in get_args(Pooling):
        raise ConfigError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    if pooling is None and spec.pooling == "none":
        raise ConfigError(
            "this model was not made for embeddings, so it says nothing about pooling",
            hint='choose how: pooling="mean" or pooling="last"',
        )
    return "last" if pooling is None else pooling


def hidden_request(
    token_ids: Sequence[int], pooling: Pooling, spec: ModelSpec, context: int
) -> Request:
    """Return the request for the hidden states that `pool` needs.

    Raises:
        ConfigError, ContextOverflowError: as `logits_request`.
    """
    start = max(0, len(token_ids) - 1) if pooling == "last" else 0
    readout = Readout(OutputKind.HIDDEN, start=start, count=len(token_ids) - start)
    return readout_request(token_ids, readout, spec.vocab_size, context)


def pool(hidden: F32, *, normalize: bool) -> F32:
    """Return the mean of hidden states, float32 [rows, hidden], as float32 [hidden].

    Args:
        hidden: states after the final norm.
        normalize: scale the mean to length 1.

    Raises:
        CheckpointError: NaN or infinity, or a vector of zeros that has no direction.
    """
    mean = hidden.mean(axis=0, dtype=np.float64)
    length = float(np.sqrt((mean * mean).sum()))
    if not np.isfinite(length) or (normalize and length == 0):
        raise CheckpointError(
            "the model computes no number for the embedding of a text",
            hint="its weights are damaged or overflow; download it again",
        )
    scaled: F32 = (mean / length if normalize else mean).astype(np.float32)
    return scaled
