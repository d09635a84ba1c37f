"""`bitllm perplexity`: how well a model foresees a text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from bitllm.cli.model import load_model, split_options
from bitllm.cli.options import (
    engine_options,
    json_option,
    model_reference,
    option,
    verbose_option,
)
from bitllm.cli.terminal import emit, emit_json, progress
from bitllm.cli.text_input import STDIN, read_file

if TYPE_CHECKING:
    from bitllm.engine.llm import LLM
    from bitllm.engine.outputs import TextScore

__all__ = ["perplexity"]


@click.command()
@model_reference
@option(
    "-f",
    "--file",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True),
    default=STDIN,
    help="A UTF-8 text file. Default: -, which is stdin.",
)
@option(
    "--stride",
    metavar="N",
    type=click.IntRange(min=1),
    help="Tokens from one window to the next. Default: half of the context.",
)
@option(
    "--tokens",
    metavar="N",
    type=click.IntRange(min=2),
    help="Read only so many tokens from the beginning of the text.",
)
@engine_options
@json_option
@verbose_option
def perplexity(
    model: str | None,
    file: str,
    stride: int | None,
    tokens: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how well a model foresees a text.

    Every token but the first is scored once; the first of a text is scored if the model has a start
    token. A text longer than --context is read in windows that overlap: each token then sees at
    least --context less --stride tokens before it. Perplexities of a token compare models with the
    same vocabulary, at the same context and stride; bits per byte compare any. The figure behind ±
    is the standard error.

    \b
    bitllm perplexity ./my-model -f wiki.test.raw --context 2048
    bitllm perplexity -m 2b --json < chapter.txt
    """  # noqa: D301
    text = read_file(file)
    llm = load_model(model, split_options(options)[0])
    facts = _measured(llm, text, stride, tokens)
    facts = {"model": llm.name, "file": "stdin" if file == STDIN else file, **facts}
    if as_json:
        emit_json(facts)
    else:
        emit("\n".join(_lines(facts)))


def _measured(llm: LLM, text: str, stride: int | None, tokens: int | None) -> dict[str, Any]:
    with progress("reading") as advance:
        started = time.perf_counter()
        score = llm.score_text(text, limit=tokens, stride=stride, progress=advance)
    return {
        "context": llm.context,
        "stride": llm.context // 2 if stride is None else stride,
        **_figures(score),
        "seconds": time.perf_counter() - started,
    }


def _figures(score: TextScore) -> dict[str, Any]:
    """Return the figures of a score; JSON has no infinity, so what overflows becomes null."""
    figures = {
        "scored_tokens": score.tokens,
        "scored_bytes": score.text_bytes,
        "logprob": score.logprob,
        "perplexity": score.perplexity,
        "perplexity_error": score.perplexity_error,
        "byte_perplexity": score.byte_perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    speed = facts["scored_tokens"] / facts["seconds"]
    yield f"model       {facts['model']}"
    yield (
        f"text        {facts['file']}: {facts['scored_tokens']} tokens scored,"
        f" {facts['scored_bytes']} bytes, {speed:.0f} tok/s"
    )
    yield f"windows     {facts['context']} tokens, {facts['stride']} apart"
    yield (
        f"perplexity  {_shown(facts['perplexity'])} ± {_shown(facts['perplexity_error'])} a token,"
        f" {_shown(facts['byte_perplexity'])} a byte"
    )
    yield f"bits        {_shown(facts['bits_per_byte'])} a byte"


def _shown(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4f}"
