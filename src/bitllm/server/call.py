"""A request on its way through the server: what a handler needs to answer it."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bitllm import __version__
from bitllm.engine import outputs
from bitllm.errors import ConfigError
from bitllm.server.admission import Admission
from bitllm.server.api_error import ApiError, as_api_error, closed, loading
from bitllm.server.event_stream import EventStream
from bitllm.server.metrics import Metrics
from bitllm.server.models import ServedModel, ServedModels
from bitllm.server.options import ServerOptions
from bitllm.server.request_log import LogEntry
from bitllm.server.responses import Usage, usage_of

__all__ = ["FINGERPRINT", "Call", "Service", "TokenClock", "json_response", "response_id"]

log = logging.getLogger("bitllm.server")

FINGERPRINT = f"bitllm-{__version__}"
"""What may change the text of a seed: the program. The machine does not."""


@dataclass(slots=True)
class Service:
    """What all requests share.

    Attributes:
        options: of the operator.
        admission: how many requests are taken on.
        metrics: what is counted.
        opened: the models, None while they are being loaded.
    """

    options: ServerOptions
    admission: Admission
    metrics: Metrics
    opened: ServedModels | None = None

    @property
    def models(self) -> ServedModels:
        """The models by name.

        Raises:
            ApiError: 503, they are being loaded.
        """
        if self.opened is None:
            raise closed() if self.admission.draining else loading()
        return self.opened

    def loaded(self) -> list[ServedModel]:
        """Return the models in memory."""
        return [] if self.opened is None else self.opened.loaded()

    def explain(self, error: Exception) -> ApiError:
        """Return the answer that an exception stands for; what is a bug is logged."""
        if self.admission.cut and isinstance(error, ConfigError):
            return closed()  # what the engine says of its own end
        found = as_api_error(error)
        if found is None:
            log.error("a request failed", exc_info=error)
            found = ApiError(500, "the server failed; its log tells why")
        return found


@dataclass(slots=True)
class Call:
    """One request.

    Attributes:
        service: what all requests share.
        request: as starlette has it.
        entry: what the log will say.
        stack: what is held until the answer has been sent.
        started: when it came, by `time.perf_counter`.
        created: the same in seconds since 1970.
    """

    service: Service
    request: Request
    entry: LogEntry
    stack: AsyncExitStack
    started: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))

    async def model(self, name: str | None) -> ServedModel:
        """Return the model that answers to `name`, held until the answer has been sent.

        Raises:
            ApiError: 404, there is none.
        """
        served = await self.stack.enter_async_context(self.service.models.lease(name))
        self.entry.model = served.name
        return served

    def count(self, model: str, prompts: list[list[outputs.Usage]]) -> Usage:
        """Count the tokens of a generation that has ended, and return them."""
        usage = usage_of(prompts)
        metrics = self.service.metrics
        metrics.prompt_tokens.add(usage.prompt_tokens, model=model)
        metrics.completion_tokens.add(usage.completion_tokens, model=model)
        metrics.cached_tokens.add(usage.prompt_tokens_details.cached_tokens, model=model)
        metrics.whole_request.observe(time.perf_counter() - self.started, model)
        self.entry.prompt_tokens = usage.prompt_tokens
        self.entry.completion_tokens = usage.completion_tokens
        return usage

    def events(self, events: AsyncGenerator[bytes, None]) -> EventStream:
        """Return a streamed answer."""
        service = self.service
        return EventStream(events, service.explain, keep_alive=service.options.keep_alive)


class TokenClock:
    """Measures when the tokens of a stream come.

    Args:
        call: the request.
        model: its model.
    """

    def __init__(self, call: Call, model: str) -> None:
        self._metrics, self._model = call.service.metrics, model
        self._started = call.started
        self._last: dict[tuple[int, int], float] = {}

    def tick(self, chunk: outputs.Chunk, prompt: int = 0) -> None:
        """Note that a chunk of this prompt has come."""
        now = time.perf_counter()
        last = self._last.get((prompt, chunk.index))
        if last is None:
            self._metrics.first_token.observe(now - self._started, self._model)
        elif chunk.token_ids:
            each = (now - last) / len(chunk.token_ids)
            self._metrics.between_tokens.observe(each, self._model, len(chunk.token_ids))
        self._last[prompt, chunk.index] = now


def response_id(prefix: str) -> str:
    """Return an id that no other answer has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """Return a struct as a JSON answer."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")
