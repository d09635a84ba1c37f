"""Tool calls: how a model is told of tools, what a forced call looks like, and what was called."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitllm.config import SamplingParams
from bitllm.engine.outputs import ToolCall
from bitllm.errors import ConfigError
from bitllm.tokenizer import Tokenizer

__all__ = ["Tool", "ToolChoice", "constrain_call", "parse_calls", "read_tools", "tool_prompt"]

ToolChoice = str | Mapping[str, Any]
""""auto", "none", "required", or {"type": "function", "function": {"name": ...}}."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}

# What is told to models whose template knows of no tools.
_INSTRUCTIONS = """You may call these functions, each given with the JSON schema of its parameters:
{tools}

To call one, answer with nothing but
<tool_call>
{{"name": "<its name>", "arguments": {{<its arguments as JSON>}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: letters, digits, "_", "." and "-".
        parameters: JSON schema of its arguments, that of an object.
        definition: as it is told to the model: {"type": "function", "function": {...}}.
    """

    name: str
    parameters: Mapping[str, Any]
    definition: Mapping[str, Any]


def read_tools(tools: Sequence[Mapping[str, Any]], choice: ToolChoice) -> tuple[list[Tool], int]:
    """Return the tools that may be called, and how many calls the choice forces: 0 or 1.

    Args:
        tools: {"type": "function", "function": {"name", "description", "parameters"}}, or what
            stands there under "function".
        choice: see `ToolChoice`.

    Raises:
        ConfigError: no such tool, or one that is not written like this.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ConfigError(f"tools must be a list of functions, got {tools!r:.80}")
    known = {}
    for tool in map(_read_tool, tools):
        if tool.name in known:
            raise ConfigError(f"there are two tools with the name {tool.name!r}")
        known[tool.name] = tool
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
        if name not in known:
            raise ConfigError(f"tool_choice names {name!r}, which is none of the tools")
        return [known[name]], 1
    if choice == "none":
        return [], 0
    if choice not in ("auto", "required"):
        raise ConfigError(
            f"tool_choice must be 'auto', 'none', 'required' or name a function, got {choice!r:.80}"
        )
    if choice == "required" and not known:
        raise ConfigError("tool_choice is 'required', but there are no tools")
    return list(known.values()), int(choice == "required")


def _read_tool(tool: Mapping[str, Any]) -> Tool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"a tool has no name, or one that cannot be: {tool!r:.100}",
            hint='{"type": "function", "function": {"name": "add", "parameters": {...}}}',
        )
    parameters = function.get("parameters") or _NO_PARAMETERS
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"the parameters of tool {name!r} must be a JSON schema")
    return Tool(name, parameters, {"type": "function", "function": dict(function)})


def tool_prompt(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], tokenizer: Tokenizer
) -> list[int]:
    """Return the token ids of a chat in which these tools may be called.

    A template that knows of tools writes them; else they are told in the system message.

    Raises:
        ChatTemplateError: the model has no chat template, or it refuses these messages.
    """
    if _template_has_tools(tokenizer):
        return tokenizer.encode_chat(messages, tools=[tool.definition for tool in tools] or None)
    # What is no list of messages is refused by the tokenizer, in its own words.
    if not tools and not any(map(_has_calls, messages)):
        return tokenizer.encode_chat(messages)
    plain = [_plain(message) for message in messages]
    if tools:
        listed = "\n".join(json.dumps(tool.definition["function"]) for tool in tools)
        told = _INSTRUCTIONS.format(tools=listed)
        if plain and plain[0].get("role") == "system":
            told = f"{plain.pop(0).get('content') or ''}\n\n{told}"
        plain.insert(0, {"role": "system", "content": told})
    return tokenizer.encode_chat(plain)


def _template_has_tools(tokenizer: Tokenizer) -> bool:
    return re.search(r"\btools\b", tokenizer.chat_template or "") is not None


def _has_calls(message: object) -> bool:
    if not isinstance(message, Mapping):
        return False
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def _plain(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write calls and their results as text, for templates that know of neither."""
    if message.get("role") == "tool":
        result = f"<tool_response>\n{message.get('content')}\n</tool_response>"
        return {"role": "user", "content": result}
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or not calls:
        return dict(message)
    blocks = [message["content"]] if message.get("content") else []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise ConfigError(
                f"a tool call in messages has no function: {call!r:.80}",
                hint='{"type": "function", "function": {"name": "add", "arguments": "{...}"}}',
            )
        arguments = _as_object(function.get("arguments"))
        said = json.dumps({"name": function.get("name"), "arguments": arguments})
        blocks.append(f"<tool_call>\n{said}\n</tool_call>")
    return {"role": message.get("role"), "content": "\n".join(blocks)}


def constrain_call(
    params: SamplingParams, tools: Sequence[Tool], tokenizer: Tokenizer
) -> SamplingParams:
    """Return the parameters under which nothing but a call of one of these tools is written.

    Raises:
        ConfigError: `params` ask for a form of their own.
    """
    schema = _call_schema(tools, _arguments_key(tokenizer))
    if any((params.json_schema, params.regex, params.grammar, params.choice)):
        raise ConfigError("a forced tool call has a form of its own; drop json_schema and the like")
    if not _is_wrapped(tokenizer):
        return replace(params, json_schema=schema)
    text = json.dumps({**schema, "x-guidance": _COMPACT})
    return replace(
        params, grammar=f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {text}'
    )


def _is_wrapped(tokenizer: Tokenizer) -> bool:
    template = tokenizer.chat_template or ""
    return "<tool_call>" in template or not _template_has_tools(tokenizer)


def _arguments_key(tokenizer: Tokenizer) -> str:
    # Llama 3.1 and its like call them so, in the text of their template.
    asks = '"parameters": dict' in (tokenizer.chat_template or "")
    return "parameters" if asks and not _is_wrapped(tokenizer) else "arguments"


def _call_schema(tools: Sequence[Tool], key: str) -> dict[str, Any]:
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: {"$ref": f"#/$defs/tool{index}"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    parameters = {
        f"tool{index}": _moved(tool.parameters, f"#/$defs/tool{index}")
        for index, tool in enumerate(tools)
    }
    return {"$defs": parameters, "anyOf": calls}


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references to itself hold where it now stands."""
    if isinstance(schema, Mapping):
        moved = {key: _moved(value, place) for key, value in schema.items()}
        target = moved.get("$ref")
        if isinstance(target, str) and target.startswith("#"):
            moved["$ref"] = place + target[1:]
        return moved
    return [_moved(value, place) for value in schema] if isinstance(schema, list) else schema


def parse_calls(text: str, names: frozenset[str]) -> tuple[ToolCall, ...]:
    """Return the calls in an answer; what is no call of one of these names is left out.

    A call is JSON with the name and the arguments, between <tool_call> and </tool_call>, or it is
    the whole answer, alone or as a list.
    """
    bare = text.strip().removeprefix("<|python_tag|>")
    calls: list[ToolCall] = []
    for block in _BLOCK.findall(text) or [bare]:
        try:
            found = json.loads(block)
        except (ValueError, RecursionError):
            continue
        for call in found if isinstance(found, list) else [found]:
            name = call.get("name") if isinstance(call, dict) else None
            if isinstance(name, str) and name in names:
                arguments = _as_object(call.get("arguments", call.get("parameters", {})))
                calls.append(ToolCall(name, arguments))
    return tuple(calls)


def _as_object(arguments: object) -> dict[str, Any]:
    """Return arguments as a dictionary, also where they are given as JSON text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return dict(arguments) if isinstance(arguments, Mapping) else {}
