"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from bitllm.config import SamplingParams
from bitllm.errors import (
    BitllmError,
    ConfigError,
    ContextOverflowError,
    InsufficientMemoryError,
    ModelNotFoundError,
    TokenizerError,
)

__all__ = [
    "ApiError",
    "ErrorDetail",
    "ErrorResponse",
    "as_api_error",
    "closed",
    "loading",
    "not_served",
]

_PATH = re.compile(r"^(?P<what>.*?) - at `(?:key in )?\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_FIRST_WORD = re.compile(r"[a-z][a-z_]*")
_OPTIONS = frozenset(item.name for item in dataclasses.fields(SamplingParams))
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


class ErrorDetail(msgspec.Struct):
    """What went wrong.

    Attributes:
        message: for a person.
        type: the kind of error.
        param: the field of the request that is wrong, or null.
        code: a word for programs, or null.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: HTTP status.
        message: for a person.
        param: the field of the request that is wrong.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message, _TYPES.get(status, "server_error"), param, code)
        self.headers = headers

    def body(self) -> bytes:
        """Return the error as JSON."""
        return msgspec.json.encode(ErrorResponse(self.detail))

    def response(self) -> Response:
        """Return the error as an answer."""
        return Response(self.body(), self.status, self.headers, "application/json")


def closed() -> ApiError:
    """Return the answer of a server that takes no more requests."""
    return ApiError(
        503,
        "the server is shutting down",
        code="shutting_down",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def loading() -> ApiError:
    """Return the answer of a server whose models are not in memory yet."""
    return ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "2"})


def not_served(name: str, known: list[str]) -> ApiError:
    """Return the answer to a model name that is not served."""
    return ApiError(
        404,
        f"the model {name!r:.200} is not served here; there are: {', '.join(known)}",
        param="model",
        code="model_not_found",
    )


def as_api_error(error: Exception) -> ApiError | None:
    """Return the answer that an exception stands for, None for a bug."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, msgspec.MsgspecError | RecursionError):
        return _malformed(error)
    if isinstance(error, BitllmError):
        return _refused(error)
    return None


def _malformed(error: Exception) -> ApiError:
    """Tell what is wrong with a JSON text, and where."""
    if isinstance(error, RecursionError):
        return ApiError(400, "the JSON of the request is nested too deeply", code="invalid_json")
    if not isinstance(error, msgspec.ValidationError):
        return ApiError(400, f"the request is no JSON: {error}", code="invalid_json")
    found = _PATH.match(str(error))
    what, path = (found["what"], found["path"]) if found else (str(error), "")
    missing = _MISSING.fullmatch(what)
    if missing is not None:
        path = ".".join(filter(None, (path, missing[1])))
        return ApiError(400, f"{path} is missing", param=path, code="missing_value")
    where = f"{path}: " if path else ""
    return ApiError(400, f"{where}{what}", param=path or None, code="invalid_type")


def _refused(error: BitllmError) -> ApiError:
    text = error.message if error.hint is None else f"{error.message} (hint: {error.hint})"
    if isinstance(error, ContextOverflowError):
        return ApiError(400, text, code="context_length_exceeded")
    if isinstance(error, ModelNotFoundError):
        return ApiError(404, text, param="model", code="model_not_found")
    if isinstance(error, InsufficientMemoryError):
        return ApiError(503, text, code="out_of_memory", headers={"Retry-After": "5"})
    if isinstance(error, ConfigError | TokenizerError):
        return ApiError(400, text, param=_field_named(error.message), code="invalid_value")
    return ApiError(500, text)


def _field_named(message: str) -> str | None:
    """Messages about a sampling option begin with its name."""
    word = _FIRST_WORD.match(message)
    return word[0] if word is not None and word[0] in _OPTIONS else None
