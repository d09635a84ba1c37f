"""A server of ours on a free port, in a thread of the test, and a client that hides nothing."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import bitllm
from bitllm import LLM, AsyncLLM, AsyncModelPool
from bitllm.engine.request import ModelDefaults
from bitllm.server import AdapterFiles, ServedModels, ServerOptions
from bitllm.server.app import build_service
from bitllm.server.call import Service
from bitllm.server.run import Server, listen
from byte_tokenizer import END, byte_tokenizer
from fake_decoder import FakeDecoder

PATIENCE_S = 20.0


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream; that of [DONE] is the text itself."""
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        datas = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]


class LiveServer:
    """A running server."""

    def __init__(self, server: Server, service: Service, port: int) -> None:
        self.server, self.service, self.port = server, service, port
        self.url = f"http://127.0.0.1:{port}"

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        given = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            given.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
        return self.ask("POST", path, body, headers)

    def raw(self, receive_buffer: int | None = None) -> socket.socket:
        """Return a connection, perhaps with little room for what is not read yet."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def stats(self) -> bitllm.EngineStats:
        return self.service.loaded()[0].llm.llm.stats()

    def is_idle(self) -> bool:
        stats = self.stats()
        return not (self.service.admission.under_way or stats.running or stats.waiting)


@contextmanager
def live(
    models: dict[str, LLM] | AsyncModelPool,
    *,
    adapters: Mapping[str, AdapterFiles] | None = None,
    **options: Any,
) -> Iterator[LiveServer]:
    """Serve these models while the block runs; they are closed at its end."""
    settings = ServerOptions(port=0, **{"access_log": False, "grace": 5.0, **options})
    listener = listen(settings)
    ready = threading.Event()
    started: list[LiveServer] = []
    failures: list[BaseException] = []

    async def run() -> None:
        if isinstance(models, AsyncModelPool):
            source: Any = models
        else:
            source = {name: AsyncLLM(llm) for name, llm in models.items()}
        served = ServedModels(source, adapters or {}, settings.strict_model)
        await served.load_adapters()
        service = build_service(settings, served)
        server = Server(service, ready.set)
        started.append(LiveServer(server, service, listener.getsockname()[1]))
        try:
            await server.serve(sockets=[listener])
        finally:
            await served.aclose()

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=main, name="test server")
    thread.start()
    try:
        assert ready.wait(PATIENCE_S)
        assert not failures, failures
        yield started[0]
    finally:
        if started:
            started[0].server.drain()
        thread.join(PATIENCE_S)
        listener.close()
        assert not thread.is_alive()
    assert not failures, failures


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def slow_llm(
    *,
    seconds: float = 0.01,
    blocks: int = 64,
    context: int = 1024,
    next_token: Any = None,
    template: str | None = None,
    max_batch_tokens: int = 64,
) -> LLM:
    """A model of bytes whose every step takes some time; it writes "a" without end."""
    tokenizer = byte_tokenizer() if template is None else byte_tokenizer(template=template)
    llm = LLM(
        FakeDecoder(blocks=blocks, next_token=next_token or (lambda tokens: ord("a"))),
        tokenizer,
        name="fake",
        context=context,
        max_batch_tokens=max_batch_tokens,
        defaults=ModelDefaults(stop_ids=frozenset({END})),
    )
    llm.engine._decoder.on_step = lambda: time.sleep(seconds)
    return llm


def saying(text: str) -> Callable[[list[int]], int]:
    """Return the `next_token` of a model that answers every prompt with this text, then ends."""
    said = [*text.encode(), END]

    def next_token(tokens: list[int]) -> int:
        mark = b"[reply]"
        whole = bytes(token for token in tokens if token < 256)
        place = whole.rfind(mark)
        written = len(whole) - place - len(mark) if place >= 0 else 0
        return said[min(written, len(said) - 1)]

    return next_token
