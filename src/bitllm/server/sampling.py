"""From the fields of a request to `SamplingParams`, which check the ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitllm.config import SamplingParams
from bitllm.server.api_error import ApiError
from bitllm.server.requests import GenerationRequest, ResponseFormat

__all__ = ["MOST_LOGPROBS", "check_logprobs", "sampling_params"]

MOST_LOGPROBS = 20
"""Of the likeliest tokens at each place; as OpenAI has it."""

_SAME_NAME = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "frequency_penalty", "presence_penalty", "stop", "stop_token_ids", "ignore_eos", "n",
    "best_of", "priority",
)  # fmt: skip
_FORMS = {
    "json_schema": "json_schema",
    "grammar": "grammar",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "guided_choice": "choice",
}


def sampling_params(
    request: GenerationRequest, timeout: float | None, **more: Any
) -> SamplingParams:
    """Return how to generate.

    Args:
        request: what the client says; what it leaves out is as the model says.
        timeout: of the server.
        **more: fields of `SamplingParams` that the kinds of request name differently; None = not
            given.

    Raises:
        ConfigError: a value out of range.
        ApiError: 400, a combination that cannot be.
    """
    given = {name: getattr(request, name) for name in _SAME_NAME}
    penalty = request.repetition_penalty
    given["repetition_penalty"] = request.repeat_penalty if penalty is None else penalty
    given["seed"] = _seed(request.seed)
    given["logit_bias"] = _bias(request.logit_bias)
    given["timeout"] = timeout
    given |= _form(request)
    given |= {name: value for name, value in more.items() if value is not None}
    return SamplingParams.from_options({k: v for k, v in given.items() if v is not None})


def check_logprobs(name: str, count: int | None) -> None:
    """Refuse more of the likeliest tokens than are told.

    Raises:
        ApiError: 400.
    """
    if count is not None and not 0 <= count <= MOST_LOGPROBS:
        message = f"{name} must be 0 to {MOST_LOGPROBS}, got {count}"
        raise ApiError(400, message, param=name, code="invalid_value")


def _seed(seed: int | None) -> int | None:
    """Seeds are signed for some clients, and -1 is llama.cpp's word for none."""
    if seed is None or seed == -1:
        return None
    return seed + 2**64 if -(2**63) <= seed < 0 else seed


def _bias(bias: Mapping[str, float] | list[tuple[int, float]] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    try:
        return {int(token): value for token, value in pairs}
    except ValueError as error:
        message = "logit_bias must map token ids to numbers; its keys are ids as text"
        raise ApiError(400, message, param="logit_bias", code="invalid_value") from error


def _form(request: GenerationRequest) -> dict[str, Any]:
    """Return the form of the text, by whichever name it was asked for."""
    asked = [name for name in _FORMS if getattr(request, name) is not None]
    found = {_FORMS[name]: getattr(request, name) for name in asked}
    wanted = request.response_format
    if wanted is not None and wanted.type != "text":
        asked.append("response_format")
        found["json_schema"] = _response_schema(wanted)
    if len(asked) > 1:
        message = f"{' and '.join(asked)} cannot be asked for together"
        raise ApiError(400, message, param=asked[-1], code="invalid_value")
    return found


def _response_schema(wanted: ResponseFormat) -> dict[str, Any]:
    inner = None if wanted.json_schema is None else wanted.json_schema.schema
    # llama.cpp takes the schema without its frame.
    schema = wanted.schema if inner is None else inner
    if schema is not None:
        return schema
    if wanted.type == "json_schema":
        message = "response_format of type json_schema needs json_schema.schema"
        raise ApiError(400, message, param="response_format", code="missing_value")
    return {"type": "object"}
