"""/openapi.json, made of the table of endpoints and of the structs that read and write bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from bitllm import __version__
from bitllm.server.api_error import ErrorResponse
from bitllm.server.endpoints import Endpoint

__all__ = ["openapi"]

_PLACE = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+):path\}")
_REFUSALS = {
    "400": "The request is wrong.",
    "401": "No key, or one that is not known.",
    "403": "A page or a host name that is not allowed.",
    "404": "There is no such model.",
    "408": "The request did not arrive in time.",
    "413": "The request is too large.",
    "415": "The request is no JSON.",
    "429": "Too many requests are under way.",
    "503": "The server is shutting down.",
}


def openapi(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the description of these endpoints, by OpenAPI 3.1."""
    structs = [ErrorResponse, *(each.answer for each in endpoints if each.answer is not None)]
    structs += [each.body for each in endpoints if each.body is not None]
    _, components = msgspec.json.schema_components(structs, ref_template=_PLACE)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bitllm",
            "version": __version__,
            "description": "OpenAI's endpoints for ternary language models.",
        },
        "paths": {
            _PARAMETER.sub(r"{\1}", each.paths[0]): {each.method.lower(): _operation(each)}
            for each in endpoints
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": endpoint.handler.__name__,
        "responses": {"200": _success(endpoint)},
    }
    if endpoint.public:
        described["security"] = []
    if endpoint.body is not None:
        described["requestBody"] = {"required": True, "content": _json(endpoint.body)}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(endpoint.paths[0])
    ]
    if parameters:
        described["parameters"] = parameters
    for status, meaning in _REFUSALS.items():
        described["responses"][status] = {"description": meaning, "content": _json(ErrorResponse)}
    return described


def _success(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if endpoint.answer is not None:
        content = _json(endpoint.answer)
    if endpoint.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"description": endpoint.summary, "content": content}


def _json(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _PLACE.format(name=struct.__name__)}}}
