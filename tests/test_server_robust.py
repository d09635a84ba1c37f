"""The server under clients that err, stall and flood: the others are answered; and its own end."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

from bitllm.backends.cpu import resident_bytes
from bitllm.server.connection import Connection
from live_server import Answer, LiveServer, live, saying, slow_llm, until

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BODY = {"prompt": "a", "max_tokens": 3}


def head(length: int | str, path: str = TEXT, *more: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def received(connection: socket.socket, seconds: float = 10.0) -> bytes:
    """Return all that comes until the other side closes."""
    connection.settimeout(seconds)
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except (ConnectionResetError, TimeoutError):
        pass
    return found


def error_of(answer: bytes) -> dict[str, Any]:
    return dict(json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"])


@pytest.fixture
def server() -> Any:
    with live({"m": slow_llm(seconds=0)}, max_body=1_000_000, body_timeout=1.0) as server:
        yield server
        assert server.post(TEXT, BODY).status == 200
        until(server.is_idle)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,  # TLS
        b"GET /none HTTP/9.9\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nNo colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"zz\r\n",
        b"\x00" * 1000 + b"\r\n\r\n",
    ],
)
def test_garbage(server: LiveServer, garbage: bytes) -> None:
    with server.raw() as connection:
        connection.sendall(garbage)
        answer = received(connection, 1.0)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404")), answer


def test_headers_without_end_are_not_collected(server: LiveServer) -> None:
    line = b"X: " + b"y" * 100_000 + b"\r\n"
    sent = 0
    with server.raw() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        try:
            while sent < 200_000_000:
                connection.sendall(line)
                sent += len(line)
        except OSError:
            pass
    assert sent < 20_000_000


def test_slow_headers(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.3)
    with server.raw() as silent, server.raw() as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHo")
        start = time.monotonic()
        assert received(silent) == received(slow) == b""
        assert time.monotonic() - start < 3
    with server.raw() as second:  # also behind a request that was answered
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_one(second)[0] == 200
        second.sendall(b"GET /hea")
        start = time.monotonic()
        assert received(second) == b""
        assert time.monotonic() - start < 3


def test_a_body_that_does_not_come(server: LiveServer) -> None:
    with server.raw() as connection:
        connection.sendall(head(100) + b'{"prompt"')
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert error_of(answer)["type"] == "timeout_error"


def test_a_client_that_hangs_up_in_its_body(server: LiveServer) -> None:
    with server.raw() as connection:
        connection.sendall(head(100) + b'{"prompt"')
        until(lambda: server.service.admission.under_way == 1)
    until(server.is_idle, 0.9)


def test_100_mb(server: LiveServer) -> None:
    size = 100_000_000
    for chunked in (False, True):
        with server.raw() as connection:
            start = head(size) if not chunked else head(size).replace(
                f"Content-Length: {size}".encode(), b"Transfer-Encoding: chunked"
            )  # fmt: skip
            connection.sendall(start)
            block = b'"' + b"x" * 999_999
            if chunked:
                block = f"{len(block):x}\r\n".encode() + block + b"\r\n"
            before = resident_bytes()
            try:
                for _ in range(100):
                    connection.sendall(block)
                connection.sendall(b"0\r\n\r\n" if chunked else b"")
            except OSError:
                pass
            answer = received(connection)
            assert resident_bytes() - before < 30_000_000
        assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
        assert error_of(answer)["code"] == "request_too_large"


def test_a_large_body_within_the_limit(server: LiveServer) -> None:
    body = {**BODY, "extra": "x" * 900_000}
    assert server.post(TEXT, body).status == 200
    assert server.post(TEXT, {**BODY, "extra": "x" * 1_000_000}).status == 413


def test_kept_connections_and_pipelines(server: LiveServer) -> None:
    text = json.dumps(BODY).encode()
    request = head(len(text)) + text
    with server.raw() as connection:
        for _ in range(3):
            connection.sendall(request)
            assert read_one(connection)[0] == 200
        connection.sendall(request * 4 + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answers = [read_one(connection) for _ in range(5)]
        assert [status for status, _ in answers] == [200] * 5
        assert answers[-1][1] == {"status": "ok"}


def read_one(connection: socket.socket) -> tuple[int, Any]:
    """Read one answer, and nothing of what comes after it."""
    top = b""
    while not top.endswith(b"\r\n\r\n"):
        piece = connection.recv(1)
        assert piece
        top += piece
    status = int(top.split()[1])
    (length,) = [
        int(line.split(b":")[1])
        for line in top.split(b"\r\n")
        if line.lower().startswith(b"content-length")
    ]
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return status, json.loads(body)


def test_an_old_client(server: LiveServer) -> None:
    text = json.dumps(BODY).encode()
    with server.raw() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(text) + text
        )
        assert received(connection).startswith(b"HTTP/1.1 200")


def test_head_and_slashes(server: LiveServer) -> None:
    answer = server.ask("HEAD", "/health")
    assert (answer.status, answer.body) == (200, b"")
    for path in (
        "/health/",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/../../etc/passwd",
        "//",
        "/%ff",
        "/%00",
    ):
        assert server.get(path).status == 404


def test_a_hundred_who_err_at_once(server: LiveServer) -> None:
    """Hang-ups, half requests and garbage, with an honest client between them."""
    text = json.dumps({**BODY, "max_tokens": 500, "stream": True}).encode()
    attacks = [
        head(len(text)) + text,
        head(10_000) + b"{",
        b"garbage\r\n\r\n",
        b"",
        head(2) + b"{}",
    ]
    for round_ in range(20):
        connections = [server.raw() for _ in attacks]
        for connection, attack in zip(connections, attacks, strict=True):
            connection.sendall(attack)
        if round_ % 4 == 0:
            assert server.post(TEXT, BODY).json["choices"][0]["text"] == "aaa"
        for connection in connections:
            connection.close()
    until(server.is_idle)
    assert server.stats().used_blocks == 0
    figures = server.get("/metrics").body.decode().splitlines()
    statuses = [line for line in figures if line.startswith("bitllm_requests_total")]
    assert not any('status="5' in line for line in statuses), statuses


# --- limits --------------------------------------------------------------------------------------


class Background:
    """A request that is answered meanwhile."""

    def __init__(self, server: LiveServer, path: str, body: Any) -> None:
        self.answer: Answer | None = None

        def ask() -> None:
            self.answer = server.post(path, body)

        self.thread = threading.Thread(target=ask)
        self.thread.start()

    def result(self) -> Answer:
        self.thread.join(30)
        assert self.answer is not None
        return self.answer


def test_too_many_requests_are_sent_away() -> None:
    with live({"m": slow_llm(seconds=0.01)}, max_requests=2) as server:
        others = [Background(server, TEXT, {"prompt": "a", "max_tokens": 60}) for _ in range(2)]
        until(lambda: server.service.admission.under_way == 2)
        answer = server.post(TEXT, BODY)
        assert answer.status == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json["error"]["type"] == "rate_limit_error"
        assert server.get("/health").status == 200  # who only looks is not counted
        assert [each.result().status for each in others] == [200, 200]
        assert server.post(TEXT, BODY).status == 200


def test_a_long_prompt_does_not_hold_up_the_loop() -> None:
    """Encoding is done beside the event loop: health is answered meanwhile."""
    llm = slow_llm(seconds=0, context=1024)
    encode, waited = llm.tokenizer.encode, threading.Event()

    def slow_encode(text: str, add_bos: bool = True) -> list[int]:
        if len(text) > 10:
            waited.wait(10)
        return encode(text, add_bos)

    llm.tokenizer.encode = slow_encode  # type: ignore[method-assign]
    with live({"m": llm}) as server:
        other = Background(server, TEXT, {"prompt": "x" * 20, "max_tokens": 1})
        until(lambda: server.service.admission.under_way == 1)
        start = time.monotonic()
        assert server.get("/health").status == 200
        assert server.get("/metrics").status == 200
        assert time.monotonic() - start < 2
        waited.set()
        assert other.result().status == 200


# --- the end -----------------------------------------------------------------------------------


def test_draining_answers_what_was_taken_on() -> None:
    with live({"m": slow_llm(seconds=0.01)}) as server:
        stream = Background(server, TEXT, {"prompt": "a", "max_tokens": 80, "stream": True})
        whole = Background(server, TEXT, {"prompt": "b", "max_tokens": 80})
        until(lambda: server.stats().running == 2)
        server.server.drain()
        until(lambda: server.service.admission.draining)
        refused = server.post(TEXT, BODY)
        assert refused.status == 503
        assert refused.json["error"]["code"] == "shutting_down"
        assert "retry-after" in refused.headers
        assert server.get("/health").status == 503
        assert server.get("/stats").json["draining"] is True
        assert stream.result().events[-1] == "[DONE]"
        assert len(whole.result().json["choices"][0]["text"]) == 80
        until(lambda: refuses(server))


def refuses(server: LiveServer) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", server.port)) != 0


def test_grace_has_an_end() -> None:
    with live({"m": slow_llm(seconds=0.02)}, grace=0.3) as server:
        stream = Background(server, TEXT, {"prompt": "a", "max_tokens": 900, "stream": True})
        whole = Background(server, TEXT, {"prompt": "b", "max_tokens": 900})
        until(lambda: server.stats().running == 2)
        start = time.monotonic()
        server.server.drain()
        *_, last = stream.result().events
        assert last["error"]["type"] == "unavailable_error"
        assert whole.result().status == 503
        assert time.monotonic() - start < 5


def test_idle_connections_do_not_hold_up_the_end() -> None:
    with live({"m": slow_llm(seconds=0)}) as server:
        idle, kept = server.raw(), server.raw()
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_one(kept)[0] == 200
        start = time.monotonic()
        server.server.drain()
        until(lambda: refuses(server))
        assert time.monotonic() - start < 3
        idle.close()
        kept.close()


def test_the_text_of_a_stop_is_whole_after_all_that() -> None:
    with live({"m": slow_llm(seconds=0, next_token=saying("one two"))}) as server:
        body = {"messages": [{"role": "user", "content": "x"}], "stop": " t", "stream": True}
        pieces = server.post(CHAT, body).events[:-1]
        text = "".join(each["choices"][0]["delta"].get("content", "") for each in pieces)
        assert text == "one"
