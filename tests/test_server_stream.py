"""Streamed answers: every byte of the events, tool calls in pieces, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

import bitllm
from bitllm.server.held_calls import HeldCalls, text_beside_calls
from live_server import LiveServer, live, saying, slow_llm, until

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live({"demo": bitllm.load(threads=1, kv_tokens=2048)}) as server:
        yield server


def test_every_byte_of_a_streamed_chat() -> None:
    with live({"m": slow_llm(seconds=0.002, next_token=saying("hé"))}) as server:
        body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
        answer = server.post(CHAT, body)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert "content-length" not in answer.headers
    text = re.sub(r"chatcmpl-[0-9a-f]{32}", "ID", answer.body.decode())
    text = re.sub(r'"created":\d+', '"created":0', text)
    text = re.sub(r'"timings":\{[^}]*\}', '"timings":{}', text)

    def chunk(delta: str, reason: str = "null", usage: str = "null") -> str:
        choice = f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}'
        return _event(f"[{choice}]", usage)

    def _event(choices: str, usage: str) -> str:
        return (
            'data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"m",'
            f'"choices":{choices},"system_fingerprint":"bitllm-{bitllm.__version__}",'
            f'"usage":{usage}}}\n\n'
        )

    usage = (
        '{"prompt_tokens":16,"completion_tokens":4,"total_tokens":20,'
        '"prompt_tokens_details":{"cached_tokens":0}},"timings":{}'
    )
    assert text == (
        chunk('{"role":"assistant","content":""}')
        + chunk('{"content":"h"}')
        + chunk('{"content":"é"}')
        + chunk("{}", '"stop"')
        + _event("[]", usage)
        + "data: [DONE]\n\n"
    )


def test_no_usage_unless_asked(server: LiveServer) -> None:
    events = server.post(CHAT, {"messages": HI, "stream": True, "max_tokens": 3}).events
    assert events[-1] == "[DONE]"
    assert all("usage" not in event for event in events[:-1])
    assert len({event["id"] for event in events[:-1]}) == 1


def test_the_pieces_are_the_whole(server: LiveServer) -> None:
    asked = {"n": 3, "seed": 4, "temperature": 1.0, "max_tokens": 12, "logprobs": True}
    whole = server.post(CHAT, {"messages": HI, **asked}).json["choices"]
    events = server.post(CHAT, {"messages": HI, "stream": True, **asked}).events[:-1]
    pieces = [event["choices"][0] for event in events]
    for index, choice in enumerate(whole):
        mine = [each for each in pieces if each["index"] == index]
        assert [("role" in each["delta"]) for each in mine] == [True] + [False] * (len(mine) - 1)
        text = "".join(each["delta"].get("content", "") for each in mine)
        assert text == choice["message"]["content"]
        assert [each["finish_reason"] for each in mine if each["finish_reason"]] == [
            choice["finish_reason"]
        ]
        told = [e for each in mine if each["logprobs"] for e in each["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"]


def test_several_prompts_in_one_stream(server: LiveServer) -> None:
    asked = {"prompt": ["The", "A", "Of"], "n": 2, "seed": 1, "max_tokens": 7, "logprobs": 0}
    whole = server.post(TEXT, asked).json
    events = server.post(
        TEXT, {**asked, "stream": True, "stream_options": {"include_usage": True}}
    ).events
    assert events[-2]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    pieces = [event["choices"][0] for event in events[:-2]]
    for choice in whole["choices"]:
        mine = [each for each in pieces if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for key, value in choice["logprobs"].items():
            assert [e for each in mine for e in each["logprobs"][key]] == value


def test_an_echo_comes_first(server: LiveServer) -> None:
    asked = {"prompt": ["The", "A"], "echo": True, "max_tokens": 3, "temperature": 0}
    whole = server.post(TEXT, asked).json["choices"]
    events = server.post(TEXT, {**asked, "stream": True}).events[:-1]
    for choice in whole:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert mine[0]["text"] == asked["prompt"][choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]


def test_an_echo_can_be_all_of_a_stream(server: LiveServer) -> None:
    events = server.post(TEXT, {"prompt": "The", "echo": True, "max_tokens": 0, "stream": True})
    assert events.status == 200
    choices = [event["choices"][0] for event in events.events[:-1]]
    assert [(each["text"], each["finish_reason"]) for each in choices] == [
        ("The", None),
        ("", "length"),
    ]


def test_what_is_wrong_with_a_prompt_is_an_ordinary_400(server: LiveServer) -> None:
    for path, body in (
        (CHAT, {"messages": HI, "max_tokens": 9999}),
        (CHAT, {"messages": HI, "guided_regex": "("}),
        (TEXT, {"prompt": [["x"]]}),
        (TEXT, {"prompt": [[1], [99999]]}),
    ):
        answer = server.post(path, {**body, "stream": True})
        assert answer.status == 400
        assert answer.headers["content-type"] == "application/json"
    until(server.is_idle)


def test_an_error_in_mid_stream_is_the_last_event() -> None:
    def breaks(tokens: list[int]) -> int:
        if len(tokens) > 20:
            raise bitllm.CheckpointError("layer 3 holds no numbers")
        return ord("a")

    with live({"m": slow_llm(seconds=0, next_token=breaks)}) as server:
        answer = server.post(CHAT, {"messages": HI, "stream": True, "max_tokens": 100})
        assert answer.status == 200
        *pieces, error = answer.events
        assert error["error"]["message"] == "layer 3 holds no numbers"
        assert error["error"]["type"] == "server_error"
        assert "".join(each["choices"][0]["delta"]["content"] for each in pieces) == "aaaaa"
        assert server.post(CHAT, {"messages": HI, "max_tokens": 100}).status == 500
        assert server.post(CHAT, {"messages": HI, "max_tokens": 2}).status == 200


def test_a_bug_in_mid_stream_tells_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    def breaks(tokens: list[int]) -> int:
        raise ZeroDivisionError("secret")

    with live({"m": slow_llm(seconds=0, next_token=breaks)}) as server:
        answer = server.post(CHAT, {"messages": HI, "stream": True})
        assert answer.events[-1]["error"]["type"] == "server_error"
        assert "secret" not in answer.body.decode()
        answer = server.post(CHAT, {"messages": HI})
        assert (answer.status, answer.json["error"]["type"]) == (500, "server_error")
        assert "secret" not in answer.body.decode()
    assert caplog.text.count("ZeroDivisionError: secret") == 2


def test_silence_is_broken_by_comments() -> None:
    with live({"m": slow_llm(seconds=0.4, max_batch_tokens=8)}, keep_alive=0.2) as server:
        answer = server.post(TEXT, {"prompt": "a" * 20, "max_tokens": 2, "stream": True})
        text = answer.body.decode()
        assert text.startswith(": ping\n\n")
        assert [each["choices"][0]["text"] for each in answer.events[:-1]] == ["a", "a"]
        assert answer.events[-1] == "[DONE]"


# --- tool calls ----------------------------------------------------------------------------------


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (each["function"]["name"], json.loads(each["function"]["arguments"]))
        for each in choice["tool_calls"]
    ]


@pytest.mark.parametrize(
    ("said", "content"),
    [(CALL, None), (f"Well, {CALL}", "Well,"), ('{"name":"add","arguments":{"a":1}}', None)],
)
def test_a_call_is_read(said: str, content: str | None) -> None:
    with live({"m": slow_llm(seconds=0, next_token=saying(said))}) as server:
        body = {"messages": HI, "tools": [TOOL]}
        (choice,) = server.post(CHAT, body).json["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == content
        assert calls_of(choice["message"]) == [("add", {"a": 1})]
        (call,) = choice["message"]["tool_calls"]
        assert set(call) == {"id", "type", "function"}
        assert call["type"] == "function"
        events = server.post(CHAT, {**body, "stream": True}).events
        deltas = [event["choices"][0] for event in events[:-1]]
        shown = "".join(each["delta"].get("content", "") for each in deltas)
        assert shown.strip() == (content or "")
        (with_calls,) = [each["delta"] for each in deltas if "tool_calls" in each["delta"]]
        assert calls_of(with_calls) == [("add", {"a": 1})]
        assert [each["index"] for each in with_calls["tool_calls"]] == [0]
        assert deltas[-1]["finish_reason"] == "tool_calls"
        assert deltas[-1]["delta"] == {}


@pytest.mark.parametrize("said", ["no call", '{"a": 1}', "< tool_call", "a <tool_call>{", "  "])
def test_what_is_no_call_is_text(said: str) -> None:
    with live({"m": slow_llm(seconds=0, next_token=saying(said))}) as server:
        body = {"messages": HI, "tools": [TOOL]}
        (choice,) = server.post(CHAT, body).json["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (said, "stop")
        assert "tool_calls" not in choice["message"]
        events = server.post(CHAT, {**body, "stream": True}).events[:-1]
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        assert text == said


def test_a_forced_call(server: LiveServer) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    for choice_wanted in ("required", named):
        body = {"messages": HI, "tools": [TOOL], "tool_choice": choice_wanted, "max_tokens": 80}
        (choice,) = server.post(CHAT, body).json["choices"]
        ((name, arguments),) = calls_of(choice["message"])
        assert name == "add"
        assert arguments["a"] in range(10)
        assert choice["message"]["content"] is None
        events = server.post(CHAT, {**body, "stream": True}).events[:-1]
        deltas = [event["choices"][0]["delta"] for event in events]
        assert "".join(each.get("content", "") for each in deltas) == ""
        assert sum("tool_calls" in each for each in deltas) == 1


def test_several_calls_or_one() -> None:
    with live({"m": slow_llm(seconds=0, next_token=saying(CALL + CALL))}) as server:
        body = {"messages": HI, "tools": [TOOL]}
        for parallel, count in ((None, 2), (True, 2), (False, 1)):
            (choice,) = server.post(CHAT, {**body, "parallel_tool_calls": parallel}).json["choices"]
            assert len(choice["message"]["tool_calls"]) == count


def test_a_conversation_with_calls_goes_on(server: LiveServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    answer = server.post(CHAT, {"messages": messages, "tools": [TOOL], "max_tokens": 4})
    assert answer.status == 200
    assert answer.json["choices"][0]["message"]["content"]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("a <tool_call>{}", "a "),
        ("a <tool_", "a "),
        ("a <tool_x", "a <tool_x"),
        ("<<tool_call>", "<"),
        (' {"a"', ""),
        ("[1]", ""),
        ("<|python_tag|>x", ""),
        ("<|py", ""),
        ("<|pizza", "<|pizza"),
        ("\n\n", ""),
        ("\n ok", "\n ok"),
    ],
)
def test_what_is_held_back(text: str, shown: str, size: int) -> None:
    held = HeldCalls(forced=False)
    pieces = [held.push(text[at : at + size]) for at in range(0, len(text), size)]
    assert "".join(pieces) == shown
    assert shown + held.rest() == text
    assert held.rest() == ""


def test_a_forced_call_is_held_back_as_a_whole() -> None:
    held = HeldCalls(forced=True)
    assert held.push("plain") == ""
    assert held.rest() == "plain"
    assert text_beside_calls(" x <tool_call>y") == "x"
    assert text_beside_calls("<tool_call>y") is None
    assert text_beside_calls('{"name": "add"}') is None


# --- clients that go away -------------------------------------------------------------------------


def send(connection: socket.socket, body: dict[str, Any], path: str = TEXT) -> None:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)


def ask_raw(server: LiveServer, body: dict[str, Any], path: str = TEXT) -> socket.socket:
    connection = server.raw()
    send(connection, body, path)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_who_hangs_up_frees_the_place(path: str, stream: bool) -> None:
    with live({"m": slow_llm(seconds=0.01)}) as server:
        body = {"prompt": ["a", "b"], "messages": HI, "max_tokens": 900, "stream": stream, "n": 2}
        connection = ask_raw(server, body, path)
        until(lambda: server.stats().running > 0)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()
        start = time.monotonic()
        until(server.is_idle, 3.0)
        assert time.monotonic() - start < 2.0  # the text would take 9 s
        assert server.stats().used_blocks == 0
        figures = server.get("/metrics").body.decode()
        assert f'bitllm_disconnects_total{{route="{path}"}} 1' in figures


def test_who_hangs_up_while_it_waits_leaves_the_queue() -> None:
    with live({"m": slow_llm(seconds=0.02, blocks=32)}) as server:
        first = ask_raw(server, {"prompt": "a" * 600, "max_tokens": 400, "stream": True})
        until(lambda: server.stats().running == 1)
        second = ask_raw(server, {"prompt": "b" * 600, "max_tokens": 400})
        until(lambda: server.stats().waiting == 1)
        second.close()
        until(lambda: server.stats().waiting == 0, 2.0)
        assert server.stats().running == 1
        first.close()
        until(server.is_idle, 3.0)


def test_who_does_not_read_holds_up_nobody_and_is_let_go() -> None:
    llm = slow_llm(seconds=0, context=1024, blocks=8 * 32)
    with live({"m": llm}, body_timeout=1.0) as server, server.raw(1) as connection:
        # 10 MB of events, more than all buffers between the two hold.
        send(connection, {"prompt": "a", "max_tokens": 900, "n": 8, "logprobs": 20, "stream": True})
        until(lambda: server.stats().running > 0)
        start = time.monotonic()
        assert server.post(TEXT, {"prompt": "b", "max_tokens": 3}).status == 200
        assert time.monotonic() - start < 2.0
        until(server.is_idle, 30.0)
        assert server.stats().decoded_tokens < 8 * 899
        assert server.stats().used_blocks == 0


def test_many_streams_write_what_each_writes_alone(server: LiveServer) -> None:
    prompts = [f"The list number {number}" for number in range(12)]
    asked = {"max_tokens": 16, "temperature": 0}
    alone = [server.post(TEXT, {"prompt": p, **asked}).json["choices"][0]["text"] for p in prompts]

    async def stream(prompt: str) -> str:
        answer = await asyncio.to_thread(
            server.post, TEXT, {"prompt": prompt, "stream": True, **asked}
        )
        return "".join(event["choices"][0]["text"] for event in answer.events[:-1])

    async def together() -> list[str]:
        return await asyncio.gather(*map(stream, prompts))

    assert asyncio.run(together()) == alone
