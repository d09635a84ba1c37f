"""Listening, and ending well: a server that is told to end answers what it has taken on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn

from bitllm.errors import ConfigError
from bitllm.server.app import build_app, build_service
from bitllm.server.call import Service
from bitllm.server.connection import HEAD_LIMIT, Connection
from bitllm.server.models import ServedModels
from bitllm.server.options import ServerOptions

__all__ = ["listen", "serve", "url_of"]

_BACKLOG = 1024
_CLOSING_SECONDS = 2


def listen(options: ServerOptions) -> socket.socket:
    """Return a socket that listens, before anything takes long.

    Raises:
        ConfigError: the address is not one of this machine, or is in use.
    """
    host, port = options.host, options.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen at {host} port {port}: {reason}",
            hint="choose another --port, or end what listens there (`bitllm ps` asks a server)",
        ) from error


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket, as this machine calls it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    models: ServedModels | Awaitable[ServedModels],
    options: ServerOptions,
    listener: socket.socket,
    *,
    on_ready: Callable[[], object] = lambda: None,
    on_drain: Callable[[int], object] = lambda count: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is under way; closes the models.

    Args:
        models: what answers; or an awaitable of it, and until it is there, requests get 503.
        options: of the operator.
        listener: as of `listen`; closed in the end.
        on_ready: called when requests are answered.
        on_drain: called when the end begins, with the number of requests under way.

    Raises:
        Exception: whatever the awaitable raises; the server has ended.
    """
    coming: Awaitable[ServedModels] | None = None
    if isinstance(models, ServedModels):
        service = build_service(options, models)
    else:
        service, coming = build_service(options), models
    server = Server(service, on_ready, on_drain, coming)
    try:
        await server.serve(sockets=[listener])
    finally:
        listener.close()
        await server.stop_loading()
        if service.opened is not None:
            await service.opened.aclose()
    if server.failure is not None:
        raise server.failure


class Server(uvicorn.Server):
    """uvicorn's server, which goes on listening while it drains.

    So probes and clients hear 503 instead of being refused. The first signal begins to drain, the
    second ends at once.

    Args:
        service: what all requests share.
        on_ready: called when requests are answered.
        on_drain: called when the end begins, with the number of requests under way.
        models: what the service is to get, where it has no models yet.

    Attributes:
        failure: why there are no models; the server then ends.
    """

    def __init__(
        self,
        service: Service,
        on_ready: Callable[[], object] = lambda: None,
        on_drain: Callable[[int], object] = lambda count: None,
        models: Awaitable[ServedModels] | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(service),
                http=Connection.with_patience(service.options.body_timeout),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=HEAD_LIMIT,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )
        self._service = service
        self._on_ready, self._on_drain = on_ready, on_drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._models = models
        self._loading: asyncio.Task[None] | None = None
        self.failure: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._models is None:
            self._on_ready()
        else:
            self._loading = self._loop.create_task(self._load(self._models))

    async def _load(self, models: Awaitable[ServedModels]) -> None:
        try:
            self._service.opened = await models
            self._on_ready()
        except Exception as error:
            self.failure = error
            self.should_exit = True

    async def stop_loading(self) -> None:
        """Wait no longer for the models."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at once where that was asked for before."""
        self.drain()

    def drain(self) -> None:
        """End after what is under way; called again: now. May be called from any thread."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_end)

    def _begin_end(self) -> None:
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())
        else:
            self._ending.cancel()
            self.should_exit = self.force_exit = True

    async def _end(self) -> None:
        admission = self._service.admission
        self._on_drain(admission.under_way)
        if not await admission.drain(self._service.options.grace):
            # Streams under way then end with an error, which their clients can tell from an end.
            admission.cut = True
            if self._service.opened is not None:
                await self._service.opened.aclose()
        self.should_exit = True
