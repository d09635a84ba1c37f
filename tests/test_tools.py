"""Tool calls: what the model is told, what it is forced to write, and what is read from it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from bitllm import LLM, AsyncLLM, ConfigError, ToolCall
from bitllm.engine.request import ModelDefaults
from bitllm.engine.tools import parse_calls
from byte_tokenizer import END, TEMPLATE, byte_tokenizer
from fake_decoder import FakeDecoder, fake_spec

HERMES = (
    "{% for t in tools or [] %}<tools>{{ t | tojson }}</tools>{% endfor %}"
    "{% if tools %}Write <tool_call>.{% endif %}" + TEMPLATE
)
LLAMA = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    'Respond as {"name": function name, "parameters": dictionary}.' + TEMPLATE
)
TEMPLATES = {"no tools": TEMPLATE, "hermes": HERMES, "llama": LLAMA}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 6},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["place", "unit"],
            "additionalProperties": False,
        },
    },
}
TREE = {
    "name": "plant",
    "parameters": {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "required": ["root"],
        "additionalProperties": False,
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["n"],
                "additionalProperties": False,
            }
        },
    },
}
NOTHING = {"type": "function", "function": {"name": "now"}}


def make_llm(template: str = TEMPLATE, next_token: Callable[[list[int]], int] | None = None) -> LLM:
    return LLM(
        FakeDecoder(blocks=64, spec=fake_spec(258, 2048), next_token=next_token),
        byte_tokenizer(template=template),
        name="fake",
        context=2048,
        max_batch_tokens=64,
        defaults=ModelDefaults(stop_ids=frozenset({END})),
    )


def prompt_of(llm: LLM, messages: Any, **options: Any) -> str:
    llm.chat(messages, max_tokens=1, **options)
    decoder: Any = llm.engine._decoder
    return llm.decode([token for step in decoder.steps for token in step.token_ids.tolist()])


def says(text: str) -> Callable[[list[int]], int]:
    """Return a `next_token` that answers a chat with `text`."""
    ids = [*text.encode(), END]

    def next_token(tokens: list[int]) -> int:
        written = bytes(token for token in tokens if token < 256).rsplit(b"[reply]", 1)[-1]
        return ids[len(written) % len(ids)]

    return next_token


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("tools", [[WEATHER], [TREE], [NOTHING], [WEATHER, TREE, NOTHING]])
def test_a_required_call_fits_its_schema(template: str, tools: list[dict[str, Any]]) -> None:
    llm = make_llm(template)
    functions = {f["name"]: f for f in (tool.get("function", tool) for tool in tools)}
    for seed in range(5):
        result = llm.chat(
            "hi", tools=tools, tool_choice="required", temperature=1.0, seed=seed, max_tokens=400
        )
        assert result.finish_reason == "stop"
        (call,) = result.tool_calls
        schema = functions[call.name].get("parameters", {"type": "object"})
        jsonschema.validate(call.arguments, schema)
    assert llm.free_blocks == 64


def test_every_tool_may_be_taken_or_one_be_named() -> None:
    llm = make_llm()
    tools = [WEATHER, TREE, NOTHING]
    asked: dict[str, Any] = {"temperature": 1.0, "max_tokens": 400, "tools": tools}
    taken = {
        llm.chat(f"{seed}", tool_choice="required", seed=seed, **asked).tool_calls[0].name
        for seed in range(40)
    }
    assert taken == {"get_weather", "plant", "now"}
    for seed in range(5):
        choice = {"type": "function", "function": {"name": "plant"}}
        result = llm.chat("hi", tool_choice=choice, seed=seed, **asked)
        assert [call.name for call in result.tool_calls] == ["plant"]


def test_the_template_writes_the_tools() -> None:
    prompt = prompt_of(make_llm(HERMES), "hi", tools=[WEATHER, TREE])
    assert f"<tools>{json.dumps(WEATHER)}</tools>" in prompt
    assert '{"type": "function", "function": {"name": "plant"' in prompt
    assert prompt.endswith("[user]hi[reply]")
    assert "<tools>" not in prompt_of(make_llm(HERMES), "hi", tools=[WEATHER], tool_choice="none")
    assert prompt_of(make_llm(HERMES), "hi") == "[user]hi[reply]"


def test_a_template_without_tools_has_them_in_the_system_message() -> None:
    prompt = prompt_of(make_llm(), "hi", tools=[WEATHER])
    assert prompt.startswith("[system]You may call")
    assert json.dumps(WEATHER["function"]) in prompt
    assert prompt.endswith("</tool_call>[user]hi[reply]")
    with_system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    prompt = prompt_of(make_llm(), with_system, tools=[WEATHER])
    assert prompt.startswith("[system]Be kind.\n\nYou may call")
    assert prompt.count("[system]") == 1
    assert prompt_of(make_llm(), with_system) == "[system]Be kind.[user]hi[reply]"


def test_calls_and_results_of_earlier_turns_are_told() -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
            ],
        },
        {"role": "tool", "content": "noon"},
    ]
    assert prompt_of(make_llm(), turns).endswith(
        '[assistant]<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>'
        "[user]<tool_response>\nnoon\n</tool_response>[reply]"
    )


def test_a_call_that_was_not_forced_is_found() -> None:
    answer = 'I look.\n<tool_call>\n{"name": "now", "arguments": {"a": [1]}}\n</tool_call>'
    llm = make_llm(next_token=says(answer))
    result = llm.chat("hi", tools=[NOTHING])
    assert result.text == answer
    assert result.tool_calls == (ToolCall("now", {"a": [1]}),)
    assert llm.chat("hi", tools=[WEATHER]).tool_calls == ()
    assert llm.chat("hi").tool_calls == ()
    chunks = list(llm.chat("hi", tools=[NOTHING], stream=True))
    assert chunks[-1].tool_calls == result.tool_calls
    assert all(chunk.tool_calls == () for chunk in chunks[:-1])

    async def test() -> Any:
        async with AsyncLLM(make_llm(next_token=says(answer))) as other:
            whole = await other.chat("hi", tools=[NOTHING])
            last = [c async for c in other.chat("hi", tools=[NOTHING], stream=True)][-1]
            return whole.tool_calls, last.tool_calls

    assert asyncio.run(test()) == (result.tool_calls, result.tool_calls)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "arguments": {"x": 1}}', [("f", {"x": 1})]),
        ('  {"name": "f", "parameters": {"x": 1}}\n', [("f", {"x": 1})]),
        ('<|python_tag|>{"name": "f", "parameters": {}}', [("f", {})]),
        ('[{"name": "f", "arguments": {}}, {"name": "g"}]', [("f", {}), ("g", {})]),
        ('{"name": "f", "arguments": "{\\"x\\": 2}"}', [("f", {"x": 2})]),
        ('{"name": "f", "arguments": "nonsense"}', [("f", {})]),
        (
            '<tool_call>{"name": "f"}</tool_call> <tool_call>{"name": "g"}',
            [("f", {}), ("g", {})],
        ),
        ('<tool_call>{"name": "f"</tool_call><tool_call>{"name": "g"}</tool_call>', [("g", {})]),
        ('{"name": "unknown", "arguments": {}}', []),
        ('{"name": ["f"]}', []),
        ("f(1)", []),
        ("", []),
        ("[" * 100000, []),
        ("<tool_call>" * 20000, []),
        ('{"name": "f"} trailing', []),
    ],
)
def test_parsing(text: str, calls: list[Any]) -> None:
    found = parse_calls(text, frozenset({"f", "g"}))
    assert [(call.name, call.arguments) for call in found] == calls


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tools": {"name": "f"}}, "tools must be a list"),
        ({"tools": "f"}, "tools must be a list"),
        ({"tools": [{}]}, "a tool has no name"),
        ({"tools": ["f"]}, "a tool has no name"),
        ({"tools": [{"name": 'a"b'}]}, "a tool has no name"),
        ({"tools": [{"name": "x" * 65}]}, "a tool has no name"),
        ({"tools": [{"name": "f", "parameters": [1]}]}, "must be a JSON schema"),
        ({"tools": [{"name": "f"}, {"name": "f"}]}, "two tools with the name 'f'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": "maybe"}, "tool_choice must be 'auto'"),
        ({"tool_choice": {"function": {"name": "g"}}, "tools": [NOTHING]}, "names 'g'"),
        (
            {"tool_choice": "required", "tools": [NOTHING], "regex": "a"},
            "a forced tool call has a form of its own",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [{"name": "f", "parameters": {"type": "nope"}}],
            },
            "cannot be compiled",
        ),
    ],
)
def test_tools_that_cannot_be(options: dict[str, Any], says: str) -> None:
    llm = make_llm()
    with pytest.raises(ConfigError, match=says):
        llm.chat("hi", **options)
    assert llm.free_blocks == 64
