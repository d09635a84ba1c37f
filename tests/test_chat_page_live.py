"""The chat page in a real Chromium, in front of the server that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect

import bitllm
from live_server import LiveServer, live, saying, slow_llm, until
from test_chat_page import answered, ask, browser, kept, pytestmark

__all__ = ["browser", "pytestmark"]  # the fixture and the condition of the other tests


@contextmanager
def page_of(browser: Browser, server: LiveServer) -> Iterator[Page]:
    """Open the page; anything that a script or the policy complains of fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(10_000)
    said: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.goto(server.url)
    expect(page.locator("#model option").first).to_be_attached()
    yield page
    context.close()
    assert [each for each in said if "status of 4" not in each] == []


def test_an_answer_streams_and_the_history_goes_along(browser: Browser) -> None:
    llm = slow_llm(seconds=0.02, next_token=saying("Hello there."))
    with live({"fake": llm}) as server, page_of(browser, server) as page:
        ask(page, "First")
        expect(page.locator(".assistant .body")).to_have_text(re.compile("^Hel"))
        expect(page.locator("#live")).to_contain_text("token")
        answered(page, "Hello there.")
        expect(page.locator(".assistant .stats")).to_contain_text(
            "13 tokens"
        )  # with that of the end
        ask(page, "Second")
        answered(page, "Hello there.", count=2)
        until(server.is_idle)


def test_stop_frees_the_engine(browser: Browser) -> None:
    with (
        live({"fake": slow_llm(seconds=0.02)}) as server,
        page_of(browser, server) as page,
    ):
        ask(page)
        expect(page.locator(".assistant .body")).to_have_text(re.compile("^aaa"))
        assert server.stats().running == 1
        page.click("#send")
        expect(page.locator(".assistant .end")).to_have_text("Stopped.")
        until(server.is_idle)
        assert kept(page)[0]["nodes"][1]["content"].startswith("aaa")


def test_settings_and_regenerate_give_what_the_model_writes(browser: Browser) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a list?"},
    ]
    asked: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "max_tokens": 12}
    with bitllm.load(threads=1) as llm:
        one, two = (llm.chat(messages, seed=seed, **asked).text for seed in (7, 8))
    assert one != two
    models = {"demo": bitllm.load(threads=1)}
    with live(models) as server, page_of(browser, server) as page:
        page.click("#settings")
        page.fill("#system-prompt", "Be brief.")
        for name, value in {**asked, "seed": 7}.items():
            page.fill(f"#set-{name}", str(value))
        page.click("text=Done")
        ask(page, "What is a list?")
        answered(page, re.compile(re.escape(one.strip())[:20]))
        page.click("#settings")
        page.fill("#set-seed", "8")
        page.click("text=Done")
        page.click("text=Regenerate")
        answered(page, re.compile(re.escape(two.strip())[:20]))
        expect(page.locator(".versions")).to_contain_text("2 of 2")
        texts = [node["content"] for node in kept(page)[0]["nodes"]]
        assert {one, two} <= set(texts)


def test_the_model_is_chosen(browser: Browser) -> None:
    models = {
        "small": slow_llm(seconds=0, next_token=saying("small")),
        "large": slow_llm(seconds=0, next_token=saying("large")),
    }
    with live(models) as server, page_of(browser, server) as page:
        page.select_option("#model", "large")
        ask(page)
        answered(page, "large")
