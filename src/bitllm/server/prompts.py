"""Prompts of requests: a text, token ids, or a list of those."""

from __future__ import annotations

from typing import cast

from bitllm.engine.prompt import Prompt
from bitllm.server.api_error import ApiError

__all__ = ["MOST_PROMPTS", "read_prompts"]

MOST_PROMPTS = 2048
"""Of a request, as OpenAI has it for embeddings; times the choices of each for completions."""


def read_prompts(given: str | list[str | int | list[int]], name: str) -> list[Prompt]:
    """Return the prompts of a request as a list.

    Args:
        given: as the client gives it.
        name: of the field.

    Raises:
        ApiError: 400, no prompt, too many, or texts, ids and lists of ids mixed.
    """
    if isinstance(given, str):
        return [given]
    kinds = {type(each) for each in given}
    if len(kinds) != 1:
        what = "is empty" if not kinds else "mixes texts, token ids and lists of token ids"
        raise ApiError(400, f"{name} {what}", param=name, code="invalid_value")
    if kinds == {int}:
        return [cast("list[int]", given)]
    if len(given) > MOST_PROMPTS:
        what = f"{name} holds {len(given)} prompts, but {MOST_PROMPTS} is the most of a request"
        raise ApiError(400, what, param=name, code="invalid_value")
    return cast("list[Prompt]", given)
