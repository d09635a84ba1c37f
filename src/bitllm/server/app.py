"""The application: routes of the endpoints and the page, behind the layers that guard them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bitllm.server.access import Access
from bitllm.server.admission import Admission
from bitllm.server.api_error import ApiError
from bitllm.server.body import decode_body, read_body
from bitllm.server.call import Call, Service
from bitllm.server.endpoints import ENDPOINTS, Endpoint
from bitllm.server.event_stream import until_gone
from bitllm.server.metrics import Metrics
from bitllm.server.models import ServedModels
from bitllm.server.openapi import openapi
from bitllm.server.options import ServerOptions
from bitllm.server.pages import page_routes
from bitllm.server.request_log import LogEntry, RequestLog

__all__ = ["build_app", "build_service"]

_DESCRIPTION = "/openapi.json"


def build_service(options: ServerOptions, models: ServedModels | None = None) -> Service:
    """Return what all requests to a server share; without models, it is still to load them."""
    return Service(options, Admission(options.max_requests), Metrics(), models)


def build_app(service: Service) -> ASGIApp:
    """Return the ASGI application of a server."""
    options = service.options
    pages = page_routes() if options.page else []
    routes = [
        Route(path, _Answer(service, endpoint, path), methods=[endpoint.method])
        for endpoint in ENDPOINTS
        for path in endpoint.paths
    ]
    routes += [Route(_DESCRIPTION, _description(), methods=["GET"]), *pages]
    public = {path for each in ENDPOINTS if each.public for path in each.paths}
    public |= {_DESCRIPTION, *(route.path for route in pages)}
    layers = [Middleware(Access, options=options, public=frozenset(public))]
    if options.cors_origins:
        layers.insert(0, _cors(options))
    app = Starlette(
        routes=routes, middleware=layers, exception_handlers={HTTPException: _http_error}
    )
    app.router.redirect_slashes = False
    return RequestLog(app, service.metrics, write=options.access_log)


def _cors(options: ServerOptions) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=options.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )


def _description() -> Any:
    text = msgspec.json.encode(openapi(ENDPOINTS))

    async def description(request: Request) -> Response:
        return Response(text, media_type="application/json")

    return description


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer paths and methods that do not exist."""
    assert isinstance(error, HTTPException)
    found = ApiError(
        error.status_code, f"{request.method} {request.url.path}: {error.detail}",
        headers=error.headers,
    )  # fmt: skip
    return found.response()


class _Answer:
    """The ASGI application of one endpoint."""

    def __init__(self, service: Service, endpoint: Endpoint, path: str) -> None:
        self._service, self._endpoint, self._path = service, endpoint, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; what it held is free when the answer has been sent."""
        entry: LogEntry = scope["bitllm.entry"]
        entry.route = self._path
        try:
            async with AsyncExitStack() as stack:
                call = Call(self._service, Request(scope, receive), entry, stack)
                response = await self._respond(call, receive)
                await response(scope, receive, send)
        except ClientDisconnect:
            entry.disconnected = True

    async def _respond(self, call: Call, receive: Receive) -> Response:
        """Return the answer, also where that is an error or a bug.

        Raises:
            ClientDisconnect: nobody waits for the answer any more.
        """
        try:
            if self._endpoint.body is None:
                return await self._endpoint.handler(call, None)
            call.stack.enter_context(self._service.admission.enter())
            body = await read_body(call.request, self._service.options)
            if self._service.options.log_bodies:
                call.entry.body = body.decode("utf-8", "replace")
            given = await decode_body(body, self._endpoint.body)
            handled = asyncio.create_task(self._handle(call, given))
            return await until_gone(receive, handled)
        except ClientDisconnect:
            raise
        except Exception as error:
            return self._service.explain(error).response()

    async def _handle(self, call: Call, given: msgspec.Struct) -> Response:
        return await self._endpoint.handler(call, given)
