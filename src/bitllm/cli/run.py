"""`bitllm run`: continue a prompt and print the text."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from bitllm.cli.answer import show
from bitllm.cli.failures import EXIT_INTERRUPTED
from bitllm.cli.model import load_model, print_status, split_options
from bitllm.cli.options import (
    adapter_option,
    engine_options,
    form_options,
    json_option,
    model_option,
    option,
    sampling_options,
    speculation_options,
    verbose_option,
)
from bitllm.cli.terminal import emit, emit_json, waiting
from bitllm.cli.text_input import STDIN, read_file, read_piped

if TYPE_CHECKING:
    from bitllm.cli.conversation import Message
    from bitllm.engine.llm import LLM
    from bitllm.engine.outputs import Usage

__all__ = ["run"]


@click.command()
@click.argument("prompt", required=False)
@model_option
@adapter_option
@option(
    "-f",
    "--file",
    "files",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True),
    multiple=True,
    help="Read a text file as prompt; may be given several times.",
)
@option("--chat", is_flag=True, help="Ask by the model's chat template.")
@option("--system", metavar="TEXT", help="System message of the chat template; implies --chat.")
@sampling_options
@form_options
@option(
    "--completions",
    "n",
    metavar="N",
    type=click.IntRange(min=1, max=128),
    help="Write so many texts, with a line of --- between them. Default: 1.",
)
@option(
    "--best-of",
    metavar="N",
    type=click.IntRange(min=1, max=128),
    help="Write so many, and show the likeliest of them.",
)
@option(
    "--logprobs",
    metavar="K",
    type=click.IntRange(min=0),
    help="With --json: log-probabilities of each token and of the K likeliest.",
)
@option(
    "--prompt-logprobs",
    metavar="K",
    type=click.IntRange(min=0),
    help="With --json: the same for the tokens of the prompt.",
)
@engine_options
@speculation_options
@json_option
@option("--stream/--no-stream", default=True, help="Print the text as it is made, or at the end.")
@option("-q", "--quiet", is_flag=True, help="Print no status line.")
@verbose_option
def run(
    prompt: str | None,
    model: str | None,
    files: tuple[str, ...],
    chat: bool,
    system: str | None,
    as_json: bool,
    stream: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue a prompt and print the text.

    The prompt is what files and stdin hold, each without its last line end, and then PROMPT, each
    on a new line; one of them is enough. Options that are not given are as the model says: see
    bitllm info.

    \b
    bitllm run "The list"
    bitllm run -m microsoft/bitnet-b1.58-2B-4T --chat "Why is the sky blue?"
    bitllm run -m ORG/NAME --chat "Sum this up in one sentence." < notes.txt
    bitllm run -f prompt.txt --json-schema schema.json --json
    """  # noqa: D301
    text = compose(*_texts(files), prompt)
    if text is None:
        raise click.UsageError("no prompt: give it as an argument or on stdin")
    engine, sampling = split_options(options)
    llm = load_model(model, engine)
    messages = _messages(text, system) if chat or system else None
    if stream and not as_json and not {"n", "best_of"} & sampling.keys():
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
        texts = [choice.text for choice in completion.choices]
        ended = (text if text.endswith("\n") else f"{text}\n" for text in texts)
        emit("---\n".join(ended), end="")
    return completion.usage


def compose(*parts: str | None) -> str | None:
    """Return the prompt: the parts that are there, each on a new line; None without any."""
    given = [part for part in parts if part]
    return "\n".join(given) if given else None


def _texts(files: tuple[str, ...]) -> list[str | None]:
    """Return the texts of the files and of stdin, which is read where `-` stands, or last."""
    texts: list[str | None] = [read_file(path) for path in files]
    if STDIN not in files:
        texts.append(read_piped())
    return [text and text.removesuffix("\n").removesuffix("\r") for text in texts]
