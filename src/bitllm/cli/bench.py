"""`bitllm bench`: the speed of a model beside what this machine can do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from bitllm.cli.model import split_options
from bitllm.cli.options import (
    engine_options,
    json_option,
    model_option,
    option,
    verbose_option,
)
from bitllm.cli.terminal import emit, emit_json, note

__all__ = ["bench"]


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them."""

    name = "numbers"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers as a tuple."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers such as 1,8", param, ctx)
        if min(numbers) < self._least:
            self.fail(f"{min(numbers)} is less than {self._least}", param, ctx)
        return numbers


@click.command()
@model_option
@option(
    "-p",
    "--prompt",
    "prompts",
    metavar="N,N",
    type=Numbers(1),
    help="Tokens of the prompts whose prefill is measured. Default: 128,512.",
)
@option(
    "-n",
    "--generate",
    metavar="N",
    type=click.IntRange(min=1),
    help="Tokens drawn in a run of decoding. Default: 32.",
)
@option(
    "--depth",
    "depths",
    metavar="N,N",
    type=Numbers(0),
    help="Tokens before the first drawn one. Default: 0,256,2048.",
)
@option(
    "--batch",
    "batches",
    metavar="N,N",
    type=Numbers(1),
    help="Sequences side by side; several take the shortest prompt only. Default: 1,8.",
)
@option(
    "--repeats",
    metavar="N",
    type=click.IntRange(min=1),
    help="Runs of each figure, of which the median is told. Default: 5.",
)
@engine_options
@option("--profile", is_flag=True, help="Also tell where the time goes, stage by stage.")
@option(
    "--small/--no-small",
    default=True,
    help="Single operations, and the latency of small models. Default: yes.",
)
@option(
    "--tune",
    is_flag=True,
    help="Measure which packing is faster for this model, and keep it for --packing auto.",
)
@option(
    "--plot",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw roofline and speeds into a .png, .svg or .pdf.",
)
@json_option
@verbose_option
def bench(model: str | None, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Measure the speed of a model beside what this machine can do.

    Before anything is timed, the model's output is compared with that of the scalar kernels: bit
    for bit on the cpu device, up to the order of float sums on mlx. Figures are medians; the spread
    is (max - min) / median. GB/s counts the weights, the head and the keys and values that a step
    has to read; GMAC/s the int8 multiplications. Both stand beside the part they are of what was
    measured on this machine in the same run; a figure above that is an error, and the exit code is
    1.

    \b
    bitllm bench -m ./my-model
    bitllm bench -m ./my-model -p 512 --depth 0,2048 --batch 1 --profile --json
    """  # noqa: D301
    from bitllm.bench import BenchSettings, run_bench
    from bitllm.bench.report import report_lines
    from bitllm.config import EngineOptions
    from bitllm.errors import MeasurementError

    engine, others = split_options(options)
    settings = BenchSettings(**others, engine=EngineOptions.from_options(engine))
    if plot is not None:
        from bitllm.bench.plot import require_matplotlib

        require_matplotlib(plot)
    result = run_bench(model, settings, lambda text: note(f"bench: {text}"))
    if as_json:
        emit_json(dataclasses.asdict(result))
    else:
        emit("\n".join(report_lines(result)))
    if plot is not None:
        from bitllm.bench.plot import draw

        draw(result, plot)
        note(f"bench: picture in {plot}")
    if result.impossible:
        raise MeasurementError(
            "above what this machine can do: " + "; ".join(result.impossible),
            hint="measure again while nothing else runs; if it stays, bitllm counts wrongly",
        )
