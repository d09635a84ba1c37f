"""Reading the body of a request: bounded in size and time, and checked against its struct."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from bitllm.server.api_error import ApiError
from bitllm.server.options import ServerOptions

__all__ = ["decode_body", "read_body"]

_Body = TypeVar("_Body")

_LARGE = 128 * 1024
"""Bytes of JSON that take about a millisecond to read: more are read beside the event loop."""
_DISCARDED_SECONDS = 2.0
_JSON_TYPE = re.compile(r"application/(.+\+)?json", re.IGNORECASE)


async def read_body(request: Request, options: ServerOptions) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: 408, 413 or 415.
        ClientDisconnect: the client has gone away.
    """
    _check_type(request)
    limit = options.max_body
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        await _discard(request)
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(options.body_timeout):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    break
            else:
                return bytes(body)
    except TimeoutError:
        message = f"the request did not arrive within {options.body_timeout:g} seconds"
        raise ApiError(408, message, headers={"Connection": "close"}) from None
    await _discard(request)
    raise _too_large(limit)


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip()
    if not _JSON_TYPE.fullmatch(kind):
        raise ApiError(415, f"requests are application/json here, not {kind!r:.80}")
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise ApiError(415, f"compressed requests are not read here: {coding!r:.80}")


async def _discard(request: Request) -> None:
    """Read on for a moment: a client that still writes would not see the answer."""
    try:
        async with asyncio.timeout(_DISCARDED_SECONDS):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
    except (TimeoutError, ClientDisconnect):
        return


def _too_large(limit: int) -> ApiError:
    message = f"the request is larger than {limit} bytes, the most that this server reads"
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


async def decode_body(body: bytes, kind: type[_Body]) -> _Body:
    """Return the JSON text of a body as its struct.

    Raises:
        msgspec.MsgspecError: it is no JSON, or not of this form.
        RecursionError: it is nested too deeply.
    """
    try:
        if len(body) <= _LARGE:
            return msgspec.json.decode(body, type=kind)
        return await asyncio.to_thread(msgspec.json.decode, body, type=kind)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"its text is not UTF-8 ({error.reason})") from error
