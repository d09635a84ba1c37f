"""`bitllm quantize`: study what rounding a dense model to a few bits does to its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitllm.cli.options import complete_model, json_option, option, verbose_option
from bitllm.cli.terminal import emit, emit_json, note, progress

if TYPE_CHECKING:
    from bitllm.convert.study import MatrixReport, StudyResult

__all__ = ["quantize"]

_BITS = ("1", "1.58", "2", "4", "8")


class BitList(click.ParamType[tuple[str, ...]]):
    """Numbers of bits with commas between them."""

    name = "bits"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Return the numbers as a tuple, each once."""
        if isinstance(value, tuple):
            return value
        parts = tuple(dict.fromkeys(part.strip() for part in str(value).split(",")))
        unknown = [part for part in parts if part not in _BITS]
        if unknown:
            self.fail(f"{unknown[0]!r} is none of {', '.join(_BITS)}", param, ctx)
        return parts


@click.command()
@click.argument("source", metavar="SRC", shell_complete=complete_model)
@option(
    "--bits",
    metavar="N,N",
    type=BitList(),
    default=",".join(_BITS),
    help="Bits of a weight. Default: 1,1.58,2,4,8.",
)
@option(
    "--granularity",
    type=click.Choice(("tensor", "row", "group")),
    help="What shares one scale. Default: tensor, or group if a group size is given.",
)
@option(
    "--group-size",
    metavar="N",
    type=click.IntRange(min=1),
    help="Weights along a row that share a scale.",
)
@option(
    "--plot",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw noise and zeros of every matrix into a .png, .svg or .pdf.",
)
@json_option
@verbose_option
def quantize(
    source: str,
    bits: tuple[Any, ...],
    granularity: Any,
    group_size: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Study what rounding a dense model to a few bits does.

    SRC is the directory of a dense model (safetensors), or org/name[@revision] on the Hugging Face
    Hub. Nothing is written: the result is a report for each projection, of its error (MSE), signal
    to quantisation noise (SQNR), cosine, zeros and scale. A dense model rounded to ternary weights
    is not usable without training, whatever the figures are.

    \b
    bitllm quantize ./dense-model
    bitllm quantize ./dense-model --bits 1.58,4 --group-size 128 --plot study.png
    """  # noqa: D301
    from bitllm.convert.study import study_checkpoint

    if plot is not None:
        from bitllm.bench.plot import require_matplotlib

        require_matplotlib(plot)
    shared: Any = granularity or ("tensor" if group_size is None else "group")
    with progress("rounding") as advance:
        result = study_checkpoint(
            source, bits, granularity=shared, group_size=group_size, advance=advance
        )
    if as_json:
        emit_json(_as_values(result))
    else:
        emit("\n".join(_lines(result)))
        note(f"\n{result.verdict}")
    if plot is not None:
        from bitllm.convert.study_plot import draw

        draw(result, plot)
        note(f"quantize: picture in {plot}")


def _lines(result: StudyResult) -> Iterator[str]:
    from bitllm.convert.study import by_bits

    width = max(len(report.name) for report in result.matrices)
    yield f"model   {result.model}, {result.whole[0].shape[0]} matrices"
    size = "" if result.group_size is None else f" of {result.group_size}"
    yield f"scales  one a {result.granularity}{size}"
    head = f"{'MSE':>9}  {'SQNR dB':>7}  {'cosine':>7}  {'zeros':>6}  {'scale':>9}"
    yield ""
    yield f"{'all matrices':<{width}}  {head}"
    for report in result.whole:
        yield _line(f"{report.bits} bits", width, report)
    for bits, reports in by_bits(result.matrices).items():
        yield ""
        yield f"{f'{bits} bits':<{width}}  {head}"
        for report in reports:
            yield _line(report.name, width, report)


def _line(name: str, width: int, report: MatrixReport) -> str:
    return (
        f"{name:<{width}}  {report.mse:>9.3g}  {report.sqnr_db:>7.2f}  {report.cosine:>7.4f}"
        f"  {report.zero_fraction:>6.1%}  {report.scale:>9.3g}"
    )


def _as_values(result: StudyResult) -> dict[str, Any]:
    """Return plain values; JSON has no infinity, so noise that is zero becomes null."""
    values = dataclasses.asdict(result)
    for report in (*values["matrices"], *values["whole"]):
        if not math.isfinite(report["sqnr_db"]):
            report["sqnr_db"] = None
    return values
