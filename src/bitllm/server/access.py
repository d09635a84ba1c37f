"""Who is answered: by key, by the name that the server is called, and by the page that asks."""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bitllm.server.api_error import ApiError
from bitllm.server.options import ServerOptions

__all__ = ["Access"]


class Access:
    """ASGI layer that turns away who may not ask.

    With keys: whoever has none of them gets 401, but for `public` paths. Without keys, a web page
    from elsewhere is the danger, since the browser of this machine's user asks on its behalf: an
    `Origin` that is neither this server nor allowed, and a `Host` that is not its name, get 403.

    Args:
        app: what answers.
        options: of the operator.
        public: paths that need no key.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions, public: frozenset[str]) -> None:
        self._app = app
        self._keys = [_digest(key) for key in options.api_keys]
        self._hosts = options.known_hosts
        self._origins = frozenset(options.cors_origins)
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http":
            refusal = self._refusal(scope["path"], Headers(scope=scope))
            if refusal is not None:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if not self._keys:
            return self._foreign(headers)
        if path in self._public:
            return None
        given = _key_of(headers)
        if given is None:
            return _unauthorised("this server wants an API key: Authorization: Bearer KEY")
        # Every key is compared, and by digests of one length: time tells nothing of them.
        matches = [hmac.compare_digest(_digest(given), key) for key in self._keys]
        return None if any(matches) else _unauthorised("the API key is not one of this server's")

    def _foreign(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self._hosts and host and _name_of(host) not in self._hosts:
            return ApiError(
                403, f"this server is not called {host!r:.200}; see --allowed-host", code="host"
            )
        origin = headers.get("origin")
        if origin is None or self._origins & {origin, "*"}:
            return None
        if urlsplit(origin).netloc.lower() == host.lower():
            return None
        return ApiError(
            403,
            f"pages of {origin!r:.200} may not ask this server; see --cors-origin",
            code="origin",
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_of(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _name_of(host: str) -> str:
    """Return the name in a Host header, without port and the brackets of IPv6."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]
