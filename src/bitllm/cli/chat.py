"""`bitllm chat`: talk with a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitllm.cli.answer import Answer, show
from bitllm.cli.conversation import COMMANDS, Conversation, Message
from bitllm.cli.failures import EXIT_INTERRUPTED, print_error
from bitllm.cli.keyboard import default_history, is_interactive, read_lines, read_typed
from bitllm.cli.model import load_model, print_status, split_options
from bitllm.cli.options import (
    adapter_option,
    engine_options,
    model_option,
    option,
    sampling_options,
    speculation_options,
    verbose_option,
)
from bitllm.cli.terminal import note
from bitllm.errors import BitllmError

if TYPE_CHECKING:
    from bitllm.engine.llm import LLM

__all__ = ["chat"]


@click.command()
@model_option
@adapter_option
@option("--system", metavar="TEXT", help="System message.")
@sampling_options
@engine_options
@speculation_options
@option(
    "--history",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File that remembers what you type. Default: bitllm/chat-history in XDG_STATE_HOME.",
)
@option("-q", "--quiet", is_flag=True, help="Print no status line.")
@verbose_option
def chat(
    model: str | None,
    system: str | None,
    history: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Talk with a model.

    On a terminal: Enter sends, Alt-Enter begins a new line, Ctrl-C stops the answer, Ctrl-D leaves,
    /help lists the commands. Without a terminal each line of stdin is a message, and Ctrl-C or an
    error ends the program.

    \b
    bitllm chat -m microsoft/bitnet-b1.58-2B-4T --system "Answer in one sentence."
    """  # noqa: D301
    engine, sampling = split_options(options)
    llm = load_model(model, engine)
    interactive = is_interactive()

    def ask(messages: list[Message], attempt: int) -> Answer:
        answer = _answer(llm, messages, attempt, sampling)
        if answer.interrupted and not interactive:
            raise click.exceptions.Exit(EXIT_INTERRUPTED)
        _report(llm, answer, attempt, quiet)
        return answer

    conversation = Conversation(ask, system)
    if not interactive:
        for line in read_lines():
            if not conversation.handle(line):
                return
        return
    note(f"{llm.name}: /help lists the commands, Ctrl-D leaves")
    words = [entry.split()[0] for entry in COMMANDS]
    for line in read_typed(history or default_history(), words):
        try:
            if not conversation.handle(line):
                return
        except BitllmError as error:
            print_error(error.message, error.hint)


def _answer(llm: LLM, messages: list[Message], attempt: int, sampling: dict[str, Any]) -> Answer:
    if attempt and "seed" in sampling:
        sampling = {**sampling, "seed": (sampling["seed"] + attempt) % 2**64}
    return show(llm.chat(messages, stream=True, **sampling))


def _report(llm: LLM, answer: Answer, attempt: int, quiet: bool) -> None:
    if answer.last is None:
        note("(stopped)")
        return
    usage = answer.last.usage
    if answer.last.finish_reason == "length" and usage is not None:
        note(f"(cut after {usage.completion_tokens} tokens)")
    if attempt and answer.last.seed is None:
        note("(greedy: the same again; start the chat with --temperature 0.8 for another)")
    if not quiet and usage is not None:
        print_status(llm, usage)
