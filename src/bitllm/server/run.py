"""Listening, and ending well: a server that is told to end answers what it has taken on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
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
    models: ServedModels,
    options: ServerOptions,
    listener: socket.socket,
    *,
    on_ready: Callable[[], object] = lambda: None,
    on_drain: Callable[[int], object] = lambda count: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is under way; closes the models.

    Args:
        models: what answers.
        options: of the operator.
        listener: as of `listen`; closed in the end.
        on_ready: called when requests are answered.
        on_drain: called when the end begins, with the number of requests under way.
    """
    service = build_service(models, options)
    server = Server(service, on_ready, on_drain)
    try:
        await server.serve(sockets=[listener])
    finally:
        listener.close()
        await models.aclose()


class Server(uvicorn.Server):
    """uvicorn's server, which goes on listening while it drains.

    So probes and clients hear 503 instead of being refused. The first signal begins to drain, the
    second ends at once.

    Args:
        service: what all requests share.
        on_ready: called when requests are answered.
        on_drain: called when the end begins, with the number of requests under way.
    """

    def __init__(
        self,
        service: Service,
        on_ready: Callable[[], object] = lambda: None,
        on_drain: Callable[[int], object] = lambda count: None,
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_ready()

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
            await self._service.models.aclose()
        self.should_exit = True
