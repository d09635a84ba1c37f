"""Who is answered: keys, foreign pages, foreign names; and what the log tells."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from bitllm import ConfigError
from bitllm.server import ServerOptions
from bitllm.server.endpoints import ENDPOINTS
from bitllm.server.options import read_api_keys
from live_server import LiveServer, live, slow_llm

TEXT = "/v1/completions"
BODY = {"prompt": "a secret prompt", "max_tokens": 2}
KEYS = ("key-one", "key-two")
PUBLIC = ["/health", "/v1/health", "/version", "/openapi.json"]


@pytest.fixture(scope="module")
def guarded() -> Any:
    with live({"m": slow_llm(seconds=0)}, api_keys=KEYS) as server:
        yield server


@pytest.fixture(scope="module")
def open_server() -> Any:
    with live({"m": slow_llm(seconds=0)}) as server:
        yield server


@pytest.mark.parametrize("key", KEYS)
def test_who_has_a_key_is_answered(guarded: LiveServer, key: str) -> None:
    for headers in (
        {"Authorization": f"Bearer {key}"},
        {"Authorization": f"bearer  {key} "},
        {"X-Api-Key": key},
    ):
        assert guarded.post(TEXT, BODY, headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer key-on"},
        {"Authorization": "Bearer key-one2"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer"},
        {"Authorization": "key-one"},
        {"Authorization": "Basic key-one"},
        {"Authorization": "Bearer k\xe9y"},
        {"X-Api-Key": ""},
        {"X-Api-Key": "key-one,key-two"},
    ],
)
def test_who_has_none_is_not(guarded: LiveServer, headers: dict[str, str]) -> None:
    answer = guarded.post(TEXT, BODY, headers)
    assert answer.status == 401
    assert answer.json["error"]["type"] == "authentication_error"
    assert answer.json["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert not any(key in answer.body.decode() for key in KEYS)


def test_what_needs_no_key(guarded: LiveServer) -> None:
    for path in PUBLIC:
        assert guarded.get(path).status == 200
    others = {path for each in ENDPOINTS for path in each.paths} - set(PUBLIC)
    assert len(others) > 10
    for path in [*others, "/nothing", "/health/", "//health", "/v1/models/x"]:
        assert guarded.get(path).status == 401, path


def test_without_keys_every_key_is_taken(open_server: LiveServer) -> None:
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer "}):
        assert open_server.post(TEXT, BODY, headers).status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", ""])
def test_foreign_pages_are_refused(open_server: LiveServer, origin: str) -> None:
    for ask in (
        open_server.post(TEXT, BODY, {"Origin": origin}),
        open_server.get("/stats", Origin=origin),
    ):
        assert ask.status == 403
        assert ask.json["error"]["code"] == "origin"
        assert "access-control-allow-origin" not in ask.headers
    assert open_server.post(TEXT, BODY, {"Origin": open_server.url}).status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example"])
def test_foreign_names_are_refused(open_server: LiveServer, host: str) -> None:
    answer = open_server.post(TEXT, BODY, {"Host": host})
    assert (answer.status, answer.json["error"]["code"]) == (403, "host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "[::1]:80", "127.0.0.1"])
def test_names_of_this_machine_are_known(open_server: LiveServer, host: str) -> None:
    assert open_server.post(TEXT, BODY, {"Host": host}).status == 200


def test_more_names_can_be_allowed() -> None:
    with live({"m": slow_llm(seconds=0)}, allowed_hosts=("Llm.Example",)) as server:
        assert server.post(TEXT, BODY, {"Host": "llm.example:80"}).status == 200
        assert server.post(TEXT, BODY, {"Host": "x.example"}).status == 403


def test_pages_of_allowed_origins() -> None:
    origin = "https://chat.example"
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    for keys in ((), KEYS):
        models = {"m": slow_llm(seconds=0)}
        with live(models, cors_origins=(origin,), api_keys=keys) as server:
            preflight = server.ask("OPTIONS", TEXT, headers=asked)
            assert preflight.status == 200
            assert preflight.headers["access-control-allow-origin"] == origin
            assert "POST" in preflight.headers["access-control-allow-methods"]
            allowed = preflight.headers["access-control-allow-headers"].lower()
            assert "authorization" in allowed
            assert "content-type" in allowed
            headers = {"Origin": origin, "Authorization": "Bearer key-one"}
            answer = server.post(TEXT, BODY, headers)
            assert answer.status == 200
            assert answer.headers["access-control-allow-origin"] == origin
            # A page has to be able to read why it is refused.
            if keys:
                refused = server.post(TEXT, BODY, {"Origin": origin})
                assert refused.status == 401
                assert refused.headers["access-control-allow-origin"] == origin
            other = server.ask("OPTIONS", TEXT, headers={**asked, "Origin": "https://evil.example"})
            assert other.status == 400
            assert "access-control-allow-origin" not in other.headers


def test_every_origin_can_be_allowed() -> None:
    with live({"m": slow_llm(seconds=0)}, cors_origins=("*",)) as server:
        answer = server.post(TEXT, BODY, {"Origin": "https://any.example"})
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "*"


def test_request_ids(open_server: LiveServer) -> None:
    own = open_server.post(TEXT, BODY, {"X-Request-Id": "abc-1.2:3"})
    assert own.headers["x-request-id"] == "abc-1.2:3"
    made = [open_server.get("/nothing", **{"X-Request-Id": bad}) for bad in ("a b", "x" * 129, "")]
    ids = [answer.headers["x-request-id"] for answer in made]
    assert all(len(each) == 32 for each in ids)
    assert len(set(ids)) == 3


def test_the_log_tells_what_was_done_but_not_what_was_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.INFO, "bitllm.access"),
        live({"m": slow_llm(seconds=0)}, access_log=True) as server,
    ):
        server.post(TEXT, BODY, {"X-Request-Id": "one"})
        server.post(TEXT, {**BODY, "stream": True}, {"X-Request-Id": "two"})
        server.get("/nothing?x=a secret query".replace(" ", "%20"))
    entries = [json.loads(each.message) for each in caplog.records if each.name == "bitllm.access"]
    assert [each["status"] for each in entries] == [200, 200, 404]
    assert [each["request_id"] for each in entries[:2]] == ["one", "two"]
    first = entries[0]
    assert (first["method"], first["path"], first["model"]) == ("POST", TEXT, "m")
    assert (first["prompt_tokens"], first["completion_tokens"]) == (16, 2)
    assert first["client"] == "127.0.0.1"
    assert first["seconds"] >= 0
    assert "secret" not in caplog.text


def test_the_log_tells_prompts_if_asked(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "bitllm.access"),
        live({"m": slow_llm(seconds=0)}, access_log=True, log_bodies=True) as server,
    ):
        server.post(TEXT, {**BODY, "prompt": "line\nbreak"})
    (entry,) = [json.loads(each.message) for each in caplog.records if each.name == "bitllm.access"]
    assert json.loads(entry["body"])["prompt"] == "line\nbreak"


def test_keys_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# two keys\n\n one \ntwo\n")
    assert read_api_keys(file) == ("one", "two")
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="no API key there"):
        read_api_keys(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_api_keys(file)
    with pytest.raises(ConfigError, match="No such file"):
        read_api_keys(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 65536}, "port"),
        ({"max_body": 0}, "max_body"),
        ({"max_requests": 0}, "max_requests"),
        ({"timeout": 0}, "timeout"),
        ({"grace": -1}, "grace"),
        ({"keep_alive": 0}, "keep_alive"),
        ({"body_timeout": 0}, "body_timeout"),
        ({"api_keys": ("",)}, "API key"),
        ({"api_keys": ("clé",)}, "API key"),
        ({"pooling": "max"}, "pooling"),
    ],
)
def test_options_check_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerOptions(**options)


def test_keys_are_not_shown() -> None:
    assert "key-one" not in repr(ServerOptions(api_keys=KEYS))


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.5", False), ("example", False)],
)  # fmt: skip
def test_what_is_local(host: str, local: bool) -> None:
    options = ServerOptions(host=host)
    assert options.is_local == local
    assert bool(options.known_hosts) == local
    assert not ServerOptions(host=host, api_keys=("k",)).known_hosts
