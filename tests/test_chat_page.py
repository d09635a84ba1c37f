"""The chat page in a real Chromium, against a server that says what a test wants."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from starlette.applications import Starlette
from starlette.routing import Mount

from chat_server import ChatServer, refusal, serving, wait_until, with_policy

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"
)

HOSTILE = [
    "<script>window.pwned = 1</script>",
    '<img src="x" onerror="window.pwned = 1">',
    "<svg onload='window.pwned = 1'><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "[a](javascript:window.pwned=1) [b](JaVaScRiPt:window.pwned=1) [c](java\tscript:pwned=1)",
    "[d](data:text/html,<script>pwned=1</script>) [e](vbscript:x) [f](<javascript:pwned=1>)",
    "![g](https://evil.example/pixel.png) ![h](data:image/svg+xml,<svg/onload=pwned=1>)",
    '[i](https://evil.example/" onmouseover="window.pwned=1) <https://evil.example/"onclick=x>',
    "[j](//evil.example) [k](\\\\evil.example) [l](/admin) [&#106;avascript:x](&#106;avascript:x)",
    "```<script>pwned=1</script>\n</code></pre><script>window.pwned = 1</script>\n```",
    "| <b onclick=pwned=1>x</b> | y |\n|---|---|\n| <style>*{display:none}</style> | [z](file:x) |",
    "> <form action=https://evil.example><input name=q></form>\n\n# <base href=//evil.example>",
]

HARMLESS = {
    "a", "article", "blockquote", "button", "code", "div", "em", "h2", "h3", "h4", "h5", "h6", "li",
    "ol", "p", "pre", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Root, as in CI, cannot use Chromium's sandbox.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield launched
        launched.close()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer()
    with serving(with_policy(server.app())) as server.url:
        yield server
        server.endless = False


@pytest.fixture
def context(browser: Browser, server: ChatServer) -> Iterator[BrowserContext]:
    """A profile of its own; it ends before the server, which waits for open connections."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(10_000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: ChatServer) -> Page:
    return opened(context, server)


def opened(context: BrowserContext, server: ChatServer) -> Page:
    """Open the page, and fail the test for any error of a script."""
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(f"a script failed: {error}"))
    page.goto(server.url)
    expect(page.locator("#model option")).to_have_count(len(server.models))
    return page


def ask(page: Page, text: str = "Hi") -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page: Page, text: str | re.Pattern[str], count: int = 1) -> None:
    """Wait for the end of the answer that is the last one."""
    expect(page.locator(".message.assistant")).to_have_count(count)
    expect(page.locator(".message.assistant .body").last).to_have_text(text)
    expect(page.locator("#send")).to_have_text("Send")


def kept(page: Page) -> list[dict[str, Any]]:
    """Return the conversations in the browser's storage."""
    script = "Object.keys(localStorage).filter(k => k.startsWith('bitllm.conversation.'))"
    return [json.loads(e) for e in page.evaluate(f"{script}.map(k => localStorage.getItem(k))")]


# --- asking and answering -------------------------------------------------------------------------


def test_an_answer_grows_as_it_comes_and_ends_with_its_figures(
    page: Page, server: ChatServer
) -> None:
    server.pieces, server.allowed = ["One ", "two ", "three"], 1
    ask(page)
    body = page.locator(".assistant .body")
    expect(body).to_have_text("One")
    expect(page.locator("#live")).to_have_text("1 token")
    expect(page.locator("#send")).to_have_text("Stop")
    page.wait_for_timeout(100)  # no speed is told of a shorter time
    server.allowed = 2
    expect(body).to_have_text("One two")
    expect(page.locator("#live")).to_contain_text("tok/s")
    server.allowed = 3
    answered(page, "One two three")
    expect(page.locator(".assistant .stats")).to_contain_text("41 tokens")
    expect(page.locator(".assistant .stats")).to_contain_text("tok/s")
    expect(page.locator("#announcer")).to_have_text("One two three")
    request = server.requests[0]
    assert request["messages"] == [{"role": "user", "content": "Hi"}]
    assert request["stream"] is True
    assert request["stream_options"] == {"include_usage": True}
    assert set(request) == {"model", "messages", "stream", "stream_options"}


def test_the_history_is_sent(page: Page, server: ChatServer) -> None:
    ask(page, "First")
    answered(page, "Hello there.")
    ask(page, "Second")
    answered(page, "Hello there.", count=2)
    assert [m["content"] for m in server.requests[1]["messages"]] == [
        "First",
        "Hello there.",
        "Second",
    ]


def test_stop_closes_the_connection_and_keeps_the_text(page: Page, server: ChatServer) -> None:
    server.pieces, server.endless = ["word "], True
    ask(page)
    expect(page.locator(".assistant .body")).to_contain_text("word word")
    assert not server.left.is_set()
    page.click("#send")
    expect(page.locator(".assistant .end")).to_have_text("Stopped.")
    assert server.left.wait(10)
    assert "word word" in kept(page)[0]["nodes"][1]["content"]


def test_regenerating_adds_a_version(page: Page, server: ChatServer) -> None:
    ask(page)
    answered(page, "Hello there.")
    server.pieces = ["Another"]
    page.click("text=Regenerate")
    answered(page, "Another")
    assert server.requests[1]["messages"] == server.requests[0]["messages"]
    expect(page.locator(".versions")).to_contain_text("2 of 2")
    page.get_by_label("Earlier version").click()
    answered(page, "Hello there.")


def test_editing_forks_and_the_old_branch_stays(page: Page, server: ChatServer) -> None:
    ask(page, "First")
    answered(page, "Hello there.")
    ask(page, "Second")
    answered(page, "Hello there.", count=2)
    page.locator(".user").first.get_by_text("Edit").click()
    page.fill(".editor textarea", "Changed")
    server.pieces = ["New branch"]
    page.click(".editor >> text=Send")
    answered(page, "New branch")
    assert [m["content"] for m in server.requests[2]["messages"]] == ["Changed"]
    page.locator(".user").first.get_by_label("Earlier version").click()
    expect(page.locator(".message")).to_have_count(4)
    expect(page.locator(".user .body").last).to_have_text("Second")


def test_settings_are_sent_and_empty_ones_are_not(page: Page, server: ChatServer) -> None:
    page.click("#settings")
    page.fill("#system-prompt", "Be brief.")
    values = {"temperature": "0,5", "top_k": "40", "repetition_penalty": "1.1", "seed": "7"}
    for name, value in values.items():
        page.fill(f"#set-{name}", value)
    page.fill("#set-top_p", "nonsense")
    expect(page.locator("#set-top_p")).to_have_attribute("aria-invalid", "true")
    page.fill("#set-max_tokens", "1.5")
    expect(page.locator("#set-max_tokens-note")).to_contain_text("whole number")
    page.click("text=Done")
    ask(page)
    answered(page, "Hello there.")
    sent = server.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: sent[name] for name in values} == {
        "temperature": 0.5,
        "top_k": 40,
        "repetition_penalty": 1.1,
        "seed": 7,
    }
    assert not {"top_p", "min_p", "max_tokens"} & set(sent)


def test_the_model_is_chosen(context: BrowserContext, server: ChatServer) -> None:
    server.models = ["small", "large"]
    page = opened(context, server)
    page.select_option("#model", "large")
    ask(page)
    answered(page, "Hello there.")
    assert server.requests[0]["model"] == "large"


# --- conversations --------------------------------------------------------------------------------


def test_conversations_survive_a_reload(page: Page, server: ChatServer) -> None:
    ask(page, "About lists")
    answered(page, "Hello there.")
    page.click("#new")
    expect(page.locator(".message")).to_have_count(0)
    ask(page, "About strings")
    answered(page, "Hello there.")
    page.reload()
    expect(page.locator(".user .body")).to_have_text("About strings")
    expect(page.locator("#conversations .open")).to_have_text(["About strings", "About lists"])
    page.click("text=About lists")
    expect(page.locator(".user .body")).to_have_text("About lists")


def test_rename_and_delete(page: Page, server: ChatServer) -> None:
    ask(page, "About lists")
    answered(page, "Hello there.")
    page.click("text=Rename")
    page.fill("#conversations input", "<b>Lists</b>")
    page.press("#conversations input", "Enter")
    expect(page.locator("#conversations .open")).to_have_text("<b>Lists</b>")
    page.click("text=Delete")
    page.click("text=Keep")
    assert len(kept(page)) == 1
    page.click("text=Delete")
    page.click("#delete-dialog button[value=delete]")
    expect(page.locator(".message")).to_have_count(0)
    assert kept(page) == []


def test_export_and_import_give_the_same(
    browser: Browser, page: Page, server: ChatServer, tmp_path: Path
) -> None:
    ask(page, "Ünïcode \U0001f600")
    answered(page, "Hello there.")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "export.json"
    download.value.save_as(file)
    other = browser.new_context()
    fresh = opened(other, server)
    fresh.set_input_files("#import-file", file)
    fresh.click("#conversations >> text=Ünïcode")
    expect(fresh.locator(".assistant .body")).to_have_text("Hello there.")
    assert kept(fresh) == kept(page)
    other.close()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "bitllm-chat", "version": 2, "conversations": []}',
        '{"format": "bitllm-chat", "version": 1, "conversations": [null]}',
        '{"format": "bitllm-chat", "version": 1, "conversations": [{"id": "x", "nodes": '
        '[{"id": 1, "parent": 1, "role": "user", "content": "a circle"}]}]}',
        '{"format": "bitllm-chat", "version": 1, "conversations": [{"id": "x", "nodes": '
        '[{"id": 1, "parent": null, "role": "system", "content": "no role here"}]}]}',
        '{"format": "bitllm-chat", "version": 1, "conversations": [{"id": "x", "nodes": ['
        '{"id": 2, "parent": null, "role": "user", "content": "a"},'
        '{"id": 1, "parent": 2, "role": "user", "content": "ids that fall"}]}]}',
    ],
)
def test_a_wrong_file_changes_nothing(page: Page, tmp_path: Path, content: str) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(content)
    page.set_input_files("#import-file", file)
    expect(page.locator("#notice")).to_contain_text("wrong.json was not imported")
    assert kept(page) == []


def test_a_full_storage_is_told_and_the_answer_is_shown(page: Page, server: ChatServer) -> None:
    page.evaluate("""() => {
        let size = 1 << 20;
        for (let i = 0; size; ) try { localStorage.setItem('x' + i++, 'x'.repeat(size)); }
            catch { size >>= 1; }
    }""")
    ask(page)
    answered(page, "Hello there.")
    expect(page.locator("#notice")).to_contain_text("storage is full")


def test_damaged_storage_is_left_alone(page: Page, server: ChatServer) -> None:
    page.evaluate("localStorage.setItem('bitllm.conversation.x', '{')")
    page.reload()
    expect(page.locator("#notice")).to_contain_text("1 kept conversation")
    assert page.evaluate("localStorage.getItem('bitllm.conversation.x')") == "{"


# --- Markdown and safety --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renderer(browser: Browser) -> Iterator[Page]:
    """A page on which Markdown is shown without being asked for."""
    server = ChatServer()
    with serving(with_policy(server.app())) as server.url:
        page = browser.new_page()
        page.goto(server.url)
        yield page
        page.close()


def rendered(page: Page, pieces: list[str]) -> str:
    """Return the HTML of a text that comes in pieces."""
    script = """async (pieces) => {
        const { showMarkdown } = await import("/chat_page/markdown.js");
        const target = document.createElement("div");
        let text = "";
        for (const piece of pieces) showMarkdown(target, text += piece, true);
        showMarkdown(target, text);
        return target.innerHTML;
    }"""
    html = page.evaluate(script, pieces)
    # What all links and items have is not the point of each case.
    for common in (' target="_blank" rel="noopener noreferrer"', ' class="tight"'):
        html = html.replace(common, "")
    return str(html)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a **b *c*** d", "<p>a <strong>b <em>c</em></strong> d</p>"),
        ("a **b `c", "<p>a **b `c</p>"),
        ("***a*** **b** __c__", "<p><em><strong>a</strong></em> <strong>b</strong> "
         "<strong>c</strong></p>"),
        ("snake_case_name 2*3*4", "<p>snake_case_name 2<em>3</em>4</p>"),
        ("a * b * c ** d", "<p>a * b * c ** d</p>"),
        ("`a <b>` ``c`d``", "<p><code>a &lt;b&gt;</code> <code>c`d</code></p>"),
        (r"\*no\* \<b>", "<p>*no* &lt;b&gt;</p>"),
        ("# One\n## Two", '<h3 class="level-1">One</h3><h4 class="level-2">Two</h4>'),
        ("- a\n  - b\n    - c\n- d",
         "<ul><li><p>a</p><ul><li><p>b</p><ul><li><p>c</p></li></ul></li></ul></li>"
         "<li><p>d</p></li></ul>"),
        ("3. a\n\n   more\n4. b",
         '<ol start="3"><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>'),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        ("[a](http://b.c/d_(e)) <mailto:f@g.h>",
         '<p><a href="http://b.c/d_(e)">a</a> <a href="mailto:f@g.h">mailto:f@g.h</a></p>'),
        ("see https://b.c/d.", '<p>see <a href="https://b.c/d">https://b.c/d</a>.</p>'),
        ("a  \nb\nc", "<p>a<br>b\nc</p>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("|a|b|\n|:-:|-:|\n|1 \\| 2|",
         '<div class="table" tabindex="0"><table><thead><tr><th class="centre">a</th>'
         '<th class="end">b</th></tr></thead><tbody><tr><td class="centre">1 | 2</td>'
         "</tr></tbody></table></div>"),
        ("# a # ##  \n#\n#b", '<h3 class="level-1">a #</h3><h3 class="level-1"></h3><p>#b</p>'),
    ],
)  # fmt: skip
def test_markdown(renderer: Page, text: str, html: str) -> None:
    assert rendered(renderer, [text]) == html
    assert rendered(renderer, list(text)) == html


def test_code_is_shown_and_copied(page: Page, context: BrowserContext, server: ChatServer) -> None:
    code = "if a < b:\n    print('&amp;')"
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.pieces = [f"```python\n{code}\n```\nafter"]
    ask(page)
    expect(page.locator(".code pre")).to_have_text(code)
    expect(page.locator(".code-bar span")).to_have_text("python")
    page.get_by_label("Copy this code").click()
    expect(page.get_by_label("Copy this code")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code


def test_open_markdown_is_shown_as_it_will_be(page: Page, server: ChatServer) -> None:
    server.pieces, server.endless, server.pause = ["**bold ", "x"], True, 0.05
    ask(page)
    expect(page.locator(".assistant strong")).to_contain_text("bold x")
    page.press("body", "Escape")
    expect(page.locator(".assistant .body")).to_contain_text("**bold x")


def test_text_in_pieces_gives_what_the_whole_gives(renderer: Page) -> None:
    text = "# T\n\n1. **a** `b`\n   - c\n\n```py\nx\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n> q *r*\n\nlast"
    assert rendered(renderer, list(text)) == rendered(renderer, [text])


@pytest.mark.parametrize("piecewise", [False, True])
def test_hostile_text_runs_nothing_and_asks_nobody(
    page: Page, server: ChatServer, piecewise: bool
) -> None:
    asked: list[str] = []
    page.context.on("request", lambda request: asked.append(request.url))
    text = "\n\n".join(HOSTILE)
    server.pieces = list(text) if piecewise else [text]
    ask(page, text)
    expect(page.locator(".assistant .stats")).to_contain_text("token")
    page.reload()
    expect(page.locator(".assistant .stats")).to_contain_text("token")
    names = page.evaluate(
        "[...document.querySelectorAll('#page .message *')].map(e => e.localName)"
    )
    assert set(names) <= HARMLESS
    for link in page.locator(".message a").all():
        assert re.match(r"https?://|mailto:", link.get_attribute("href") or "")
        assert link.get_attribute("rel") == "noopener noreferrer"
    attributes = page.evaluate(
        "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    )
    assert not [name for name in attributes if name.startswith("on")]
    assert page.evaluate("window.pwned") is None
    assert asked
    assert all(url.startswith(server.url) for url in asked)


@pytest.mark.parametrize(
    "text",
    ["*a " * 20_000, "[" * 20_000, "`" * 1_001 + "a`" * 20_000, "> " * 5_000, "**a **b" * 10_000,
     "- " * 5_000, "|" * 50_000 + "\n" + "|-" * 50_000, "https://" * 10_000, "_" * 50_000,
     "# " + " " * 300_000 + "x", "a\n" * 100_000, "|a" * 90 + "\n" + "|-" * 90 + "\n|" * 100_000],
    ids=lambda text: text[:6],
)  # fmt: skip
def test_text_made_to_be_slow_is_shown(renderer: Page, text: str) -> None:
    """What fails here is a hang; the time is that of the longest text of such signs."""
    assert rendered(renderer, [text])


def test_a_page_under_its_policy_breaks_no_rule(
    context: BrowserContext, server: ChatServer
) -> None:
    said: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.goto(server.url)
    ask(page)
    answered(page, "Hello there.")
    assert said == []


def test_behind_a_proxy_that_adds_a_prefix(context: BrowserContext) -> None:
    server = ChatServer()
    answers: list[int] = []
    context.on("response", lambda response: answers.append(response.status))
    prefixed = Starlette(routes=[Mount("/some/where", with_policy(server.app()))])
    with serving(prefixed) as address:
        server.url = f"{address}some/where/"
        page = opened(context, server)
        ask(page)
        answered(page, "Hello there.")
        assert set(answers) == {200}
        page.close()


# --- errors ---------------------------------------------------------------------------------------


def test_a_missing_key_is_asked_for_and_sent(page: Page, server: ChatServer) -> None:
    server.refusals = [refusal(401, "no key")]
    ask(page)
    expect(page.locator(".failure")).to_contain_text("wants a key")
    page.click("text=Enter key")
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "secret")
    page.click("text=Done")
    page.click("text=Try again")
    answered(page, "Hello there.")
    assert server.keys == [None, "Bearer secret"]
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_busy_server_is_waited_for(page: Page, server: ChatServer) -> None:
    server.refusals = [refusal(429, "busy", None, **{"Retry-After": "1"})] * 2
    ask(page)
    expect(page.locator("#live")).to_contain_text("busy; trying again in 1 s")
    answered(page, "Hello there.")
    assert len(server.requests) == 3


def test_waiting_for_a_busy_server_can_be_stopped(page: Page, server: ChatServer) -> None:
    server.refusals = [refusal(429, "busy", None, **{"Retry-After": "60"})]
    ask(page)
    expect(page.locator("#live")).to_contain_text("busy")
    page.press("body", "Escape")
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator(".message.assistant")).to_have_count(0)


def test_a_failing_server_is_told_and_tried_again(page: Page, server: ChatServer) -> None:
    server.refusals = [refusal(500, "the <i>server</i> failed")]
    ask(page)
    expect(page.locator(".failure")).to_contain_text("the <i>server</i> failed (500)")
    page.click("text=Try again")
    answered(page, "Hello there.")
    expect(page.locator(".failure")).to_have_count(0)


def test_an_overflow_is_explained(page: Page, server: ChatServer) -> None:
    server.refusals = [refusal(400, "9 tokens, context 8.", "context_length_exceeded")]
    ask(page)
    expect(page.locator(".failure")).to_contain_text("longer than what the model can hold")
    expect(page.locator(".failure")).to_contain_text("9 tokens, context 8.")


def test_a_stream_that_breaks_off_keeps_its_text(page: Page, server: ChatServer) -> None:
    server.breaks = True
    ask(page)
    expect(page.locator(".failure")).to_contain_text("broke off")
    expect(page.locator(".assistant .body")).to_have_text("Hello there.")
    server.breaks = False
    page.click("text=Try again")
    answered(page, "Hello there.")
    expect(page.locator(".versions")).to_contain_text("2 of 2")


def test_an_error_in_the_middle_is_told(page: Page, server: ChatServer) -> None:
    server.fails = "out of memory"
    ask(page)
    expect(page.locator(".failure")).to_contain_text("out of memory")
    expect(page.locator(".assistant .body")).to_have_text("Hello there.")


def test_a_server_that_is_gone_and_comes_back(context: BrowserContext) -> None:
    server = ChatServer()
    with serving(with_policy(server.app())) as server.url:
        page = opened(context, server)
    ask(page)
    expect(page.locator(".failure")).to_contain_text("cannot be reached")
    port = int(server.url.rstrip("/").rpartition(":")[2])
    with serving(with_policy(server.app()), port):
        page.click("text=Try again")
        answered(page, "Hello there.")


# --- keyboard, width, colours, scrolling ----------------------------------------------------------


def test_all_by_keyboard(page: Page, server: ChatServer) -> None:
    keys = page.keyboard
    page.evaluate("document.activeElement.blur()")
    keys.press("/")
    expect(page.locator("#prompt")).to_be_focused()
    keys.type("one")
    keys.press("Shift+Enter")
    keys.type("two")
    keys.press("Enter")
    answered(page, "Hello there.")
    assert server.requests[0]["messages"][0]["content"] == "one\ntwo"
    keys.press("Alt+r")
    wait_until(lambda: len(server.requests) == 2)
    answered(page, "Hello there.")
    keys.press("ArrowUp")
    expect(page.locator(".editor textarea")).to_be_focused()
    keys.press("Escape")
    expect(page.locator("#prompt")).to_be_focused()
    keys.press("Alt+n")
    expect(page.locator(".message")).to_have_count(0)
    keys.press("Alt+s")
    expect(page.locator("#settings-dialog")).to_be_visible()
    keys.press("Escape")
    keys.press("?")
    expect(page.locator("#shortcuts-dialog")).to_be_visible()
    keys.press("Escape")
    server.endless = True
    keys.type("more")
    keys.press("Enter")
    expect(page.locator(".assistant .body")).to_contain_text("Hello")
    keys.press("Escape")
    expect(page.locator(".assistant .end")).to_have_text("Stopped.")


def test_the_first_tab_leads_to_the_message_box(page: Page) -> None:
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()


def test_every_control_has_a_name(page: Page, server: ChatServer) -> None:
    ask(page)
    answered(page, "Hello there.")
    page.click("#settings")
    nameless = page.evaluate("""[...document.querySelectorAll('button, input, select, textarea')]
        .filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map(e => e.id)""")
    assert nameless == []


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_needs_no_sideways_scrolling(
    browser: Browser, server: ChatServer, width: int
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, is_mobile=True, has_touch=True
    )
    page = opened(context, server)
    wide = "x" * 300
    server.pieces = [f"{wide}\n\n```\n{wide}\n```\n\n|{'a|' * 40}\n|{'-|' * 40}\n\n1. {wide}"]
    page.fill("#prompt", wide)
    page.tap("#send")
    expect(page.locator(".assistant .stats")).to_contain_text("token")
    overflow = "[document.documentElement, document.getElementById('scroller')]"
    assert page.evaluate(f"{overflow}.map(e => e.scrollWidth - e.clientWidth)") == [0, 0]
    sizes = page.evaluate(
        "[...document.querySelectorAll('input, textarea')].map(e => getComputedStyle(e).fontSize)"
    )
    assert {float(size.removesuffix("px")) for size in sizes} == {16.0}
    expect(page.locator("#sidebar")).to_be_hidden()
    page.tap("#menu")
    expect(page.locator("#sidebar")).to_be_visible()
    page.tap("#conversations .open")
    expect(page.locator("#sidebar")).to_be_hidden()
    context.close()


def brightness(page: Page) -> float:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


def test_dark_and_light(page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    assert brightness(page) < 0.2
    page.emulate_media(color_scheme="light")
    assert brightness(page) > 0.8
    page.click("#theme")
    page.emulate_media(color_scheme="dark")
    expect(page.locator("#theme")).to_have_text("Light theme")
    assert brightness(page) > 0.8
    page.click("#theme")
    page.emulate_media(color_scheme="light")
    page.reload()
    assert brightness(page) < 0.2


def test_following_yields_when_the_reader_scrolls_up(page: Page, server: ChatServer) -> None:
    server.pieces, server.endless = ["line\n\n"], True
    ask(page)
    place = "document.getElementById('scroller')"
    wait_until(lambda: page.evaluate(f"{place}.scrollTop") > 400)
    page.mouse.move(700, 400)
    page.mouse.wheel(0, -300)
    expect(page.locator("#latest")).to_be_visible()
    top = page.evaluate(f"{place}.scrollTop")
    height = page.evaluate(f"{place}.scrollHeight")
    wait_until(lambda: page.evaluate(f"{place}.scrollHeight") > height + 300)
    assert page.evaluate(f"{place}.scrollTop") <= top
    page.click("#latest")
    wait_until(lambda: page.evaluate(f"{place}.scrollTop") > height - 700)
    page.click("#send")
