"""What the operator of a server may set: `ServerOptions`, frozen and self-checking."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from bitllm.config import as_integer
from bitllm.engine.scoring import Pooling
from bitllm.errors import ConfigError

__all__ = ["ServerOptions", "read_api_keys"]

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a server is reached, by whom, and how much it takes on.

    Attributes:
        host: address or name to listen at.
        port: 0 = one that is free.
        api_keys: who gives none of them is answered 401; none = everybody is answered.
        cors_origins: origins whose pages may read the answers, such as "https://chat.example";
            "*" = all.
        allowed_hosts: names by which the server is called, besides those of this machine; looked at
            where it has neither keys nor an address in a network.
        strict_model: answer 404 to a model name that is not served, also where one model is all.
        max_body: bytes of a request.
        max_requests: requests that may be under way or wait; one more is answered 429.
        timeout: seconds after which a generation ends with what there is; None = never.
        body_timeout: seconds in which a request has to arrive; also how long a client may leave an
            answer unread.
        grace: seconds that requests under way get to end when the server is told to.
        keep_alive: seconds between the comments that keep a silent stream open.
        access_log: write a line for each request.
        log_bodies: write prompts and answers into that line.
        pooling: how hidden states become an embedding; None = as the model says.
        page: serve the chat page at `/`.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    strict_model: bool = False
    max_body: int = 32 * 1024 * 1024
    max_requests: int = 256
    timeout: float | None = None
    body_timeout: float = 60.0
    grace: float = 30.0
    keep_alive: float = 10.0
    access_log: bool = True
    log_bodies: bool = False
    pooling: Pooling | None = None
    page: bool = True

    def __post_init__(self) -> None:
        as_integer("port", self.port, low=0, high=65535)
        as_integer("max_body", self.max_body, low=1)
        as_integer("max_requests", self.max_requests, low=1)
        for name in ("body_timeout", "keep_alive"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"timeout must be above 0, got {self.timeout}")
        if not self.grace >= 0:
            raise ConfigError(f"grace must be at least 0, got {self.grace}")
        if not all(key.isascii() and key.isprintable() and key.strip() for key in self.api_keys):
            raise ConfigError("an API key is empty, or not of printable ASCII characters")
        if self.pooling is not None and self.pooling not in get_args(Pooling):
            raise ConfigError(f"pooling must be one of {', '.join(get_args(Pooling))}")

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can connect."""
        if self.host in _LOCAL_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def known_hosts(self) -> frozenset[str]:
        """Names that a `Host` header may hold, without port; empty = any.

        A page of a foreign site can have its own name resolve to this machine (DNS rebinding);
        then the browser takes the server for a part of that site, and only the name tells.
        """
        if self.api_keys or not (self.is_local or self.allowed_hosts):
            return frozenset()
        return _LOCAL_NAMES | {self.host.lower(), *(name.lower() for name in self.allowed_hosts)}


def read_api_keys(file: Path) -> tuple[str, ...]:
    """Return the keys in a file, one a line; empty lines and those that begin with # do not count.

    Raises:
        ConfigError: the file cannot be read, or holds no key.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"{file}: the API keys cannot be read: {reason}") from error
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise ConfigError(f"{file}: no API key there", hint="write one key a line")
    return keys
