"""The files of the chat page: types, security headers, caching, and nothing beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bitllm.server import pages
from live_server import LiveServer, live, slow_llm


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    folder = tmp_path / "chat_page"
    (folder / "icons").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html>é", encoding="utf-8")
    (folder / "app.js").write_text("let a = 1;")
    (folder / "style.css").write_text("body {}")
    (folder / "icons" / "mark.svg").write_text("<svg/>")
    (folder / "notes.txt").write_text("not served")
    monkeypatch.setattr(pages, "files", lambda package: tmp_path)
    with live({"m": slow_llm(seconds=0)}, api_keys=("key",)) as server:
        yield server


def test_the_files_and_their_types(server: LiveServer) -> None:
    for path, kind, body in (
        ("/", "text/html; charset=utf-8", "<!doctype html>é"),
        ("/index.html", "text/html; charset=utf-8", "<!doctype html>é"),
        ("/app.js", "text/javascript; charset=utf-8", "let a = 1;"),
        ("/chat_page/style.css", "text/css; charset=utf-8", "body {}"),
        ("/icons/mark.svg", "image/svg+xml", "<svg/>"),
    ):
        answer = server.get(path)  # without a key: the page asks for it
        assert (answer.status, answer.body.decode()) == (200, body)
        assert answer.headers["content-type"] == kind
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/notes.txt", "/chat_page/", "/../app.js", "/icons"):
        assert server.get(path).status == 401
        assert server.get(path, Authorization="Bearer key").status == 404
    assert server.post("/", {}).status == 405


def test_what_the_browser_has_is_not_sent_again(server: LiveServer) -> None:
    tag = server.get("/app.js").headers["etag"]
    assert tag != server.get("/").headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        answer = server.get("/app.js", **{"If-None-Match": known})
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["etag"] == tag
    assert server.get("/app.js", **{"If-None-Match": '"other"'}).status == 200


def test_the_page_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat_page").mkdir()
    (tmp_path / "chat_page" / "index.html").write_text("page")
    monkeypatch.setattr(pages, "files", lambda package: tmp_path)
    with live({"m": slow_llm(seconds=0)}, page=False) as server:
        assert server.get("/").status == 404
    monkeypatch.setattr(pages, "files", lambda package: tmp_path / "none")
    with live({"m": slow_llm(seconds=0)}) as server:
        assert server.get("/").status == 404
