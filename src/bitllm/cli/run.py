"""`bitllm run`: continue a prompt and print the text."""

from __future__ import annotations

import dataclasses
import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from bitllm.cli.answer import show
from bitllm.cli.failures import EXIT_INTERRUPTED
from bitllm.cli.model import load_model, print_status, split_options
from bitllm.cli.options import (
    engine_options,
    json_option,
    model_option,
    option,
    sampling_options,
    speculation_options,
    verbose_option,
)
from bitllm.cli.terminal import emit, emit_json, note, waiting

if TYPE_CHECKING:
    from bitllm.cli.conversation import Message
    from bitllm.engine.llm import LLM
    from bitllm.engine.outputs import Usage

__all__ = ["run"]

STDIN_PATIENCE_S = 3.0
"""A stdin that stays silent for this long is mentioned: it may be open by mistake."""


@click.command()
@click.argument("prompt", required=False)
@model_option
@option("--chat", is_flag=True, help="Ask by the model's chat template.")
@option("--system", metavar="TEXT", help="System message of the chat template; implies --chat.")
@sampling_options
@engine_options
@speculation_options
@json_option
@option("--stream/--no-stream", default=True, help="Print the text as it is made, or at the end.")
@option("-q", "--quiet", is_flag=True, help="Print no status line.")
@verbose_option
def run(
    prompt: str | None,
    model: str | None,
    chat: bool,
    system: str | None,
    as_json: bool,
    stream: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue a prompt and print the text.

    Text on stdin is prompt too: alone, or before PROMPT, which then follows on a new line. The last
    line end of stdin is dropped. Options that are not given are as the model says: see bitllm info.

    \b
    bitllm run "The list"
    bitllm run -m microsoft/bitnet-b1.58-2B-4T --chat "Why is the sky blue?"
    bitllm run -m ORG/NAME --chat "Sum this up in one sentence." < notes.txt
    """  # noqa: D301
    text = compose(read_stdin(), prompt)
    if text is None:
        raise click.UsageError("no prompt: give it as an argument or on stdin")
    engine, sampling = split_options(options)
    llm = load_model(model, engine)
    messages = _messages(text, system) if chat or system else None
    if stream and not as_json:
        usage = _stream(llm, messages or text, sampling)
    else:
        usage = _complete(llm, messages or text, sampling, as_json)
    if not quiet:
        print_status(llm, usage)


def _messages(text: str, system: str | None) -> list[Message]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": text}]


def _stream(llm: LLM, prompt: str | list[Message], sampling: dict[str, Any]) -> Usage:
    if isinstance(prompt, str):
        answer = show(llm.stream(prompt, **sampling))
    else:
        answer = show(llm.chat(prompt, stream=True, **sampling))
    if answer.last is None or answer.last.usage is None:
        raise click.exceptions.Exit(EXIT_INTERRUPTED)
    return answer.last.usage


def _complete(
    llm: LLM, prompt: str | list[Message], sampling: dict[str, Any], as_json: bool
) -> Usage:
    with waiting("writing"):
        if isinstance(prompt, str):
            completion = llm.generate(prompt, **sampling)
        else:
            completion = llm.chat(prompt, **sampling)
    if as_json:
        emit_json({"model": llm.name, **dataclasses.asdict(completion)})
    else:
        emit(completion.text, end="" if completion.text.endswith("\n") else "\n")
    return completion.usage


def compose(stdin: str | None, prompt: str | None) -> str | None:
    """Return the prompt: what stdin said, then the argument on a new line; None without either."""
    parts = [part for part in (stdin, prompt) if part]
    return "\n".join(parts) if parts else None


def read_stdin() -> str | None:
    """Return all of stdin without its last line end; None if a person sits at it."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    reminder = threading.Timer(
        STDIN_PATIENCE_S, note, ["waiting for the end of stdin (`< /dev/null` if there is none)"]
    )
    reminder.daemon = True
    reminder.start()
    try:
        return sys.stdin.read().removesuffix("\n").removesuffix("\r")
    finally:
        reminder.cancel()
