"""What people give as a prompt, and the token ids that it means."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from typing import Any, TypeGuard, cast

import numpy as np

from bitllm.errors import ConfigError
from bitllm.tokenizer import Tokenizer

__all__ = ["Message", "Prompt", "is_one", "pairs_to_score", "token_ids_of"]

Prompt = str | Ordered[int]
"""A text, or token ids that are used as they are."""

Message = Mapping[str, Any]
"""One turn of a chat: {"role": "user", "content": "..."}."""


def is_one(prompt: object) -> TypeGuard[Prompt]:
    """Return whether this is a single prompt: a text, or ids, which are whole numbers.

    Raises:
        ConfigError: it is neither that nor a list.
    """
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, np.ndarray):
        return prompt.ndim < 2
    if not isinstance(prompt, Ordered):
        raise ConfigError(
            f"a prompt is a text or a list of token ids, got {type(prompt).__name__}",
            hint="or a list of those",
        )
    return len(prompt) > 0 and not isinstance(prompt[0], str | Ordered | np.ndarray)


def token_ids_of(prompt: Prompt, tokenizer: Tokenizer, *, add_bos: bool = True) -> list[int]:
    """Return the token ids of a prompt; those of a text with the start token unless told not to.

    Raises:
        ConfigError: neither a text nor whole numbers in one list.
        TokenizerError: a text that cannot be encoded.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_bos=add_bos)
    try:
        ids = np.asarray(prompt)
    except (ValueError, TypeError, OverflowError):  # lists of different depths
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ConfigError(
            f"token ids must be whole numbers in one list, got {prompt!r:.80}",
            hint="give a text, a list of token ids, or a list of those",
        )
    return [int(token) for token in ids]


def pairs_to_score(
    tokenizer: Tokenizer,
    prompt: Prompt | list[str] | list[list[int]],
    continuation: Prompt | list[str] | list[list[int]],
) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each prompt and its continuation.

    Raises:
        ConfigError: a list of prompts for one continuation, or lists of different lengths.
    """
    afters = _listed(continuation)
    befores = [token_ids_of(each, tokenizer) for each in _listed(prompt)]
    if is_one(prompt):
        befores *= len(afters)
    if len(befores) != len(afters) or (is_one(continuation) and not is_one(prompt)):
        raise ConfigError(
            f"{len(befores)} prompts for {len(afters)} continuations",
            hint="give one prompt for all, or a list with one for each",
        )
    encoded = [token_ids_of(each, tokenizer, add_bos=False) for each in afters]
    return list(zip(befores, encoded, strict=True))


def _listed(prompt: Prompt | list[str] | list[list[int]]) -> list[Prompt]:
    return [prompt] if is_one(prompt) else list(cast("list[Prompt]", prompt))
