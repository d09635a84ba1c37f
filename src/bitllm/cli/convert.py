"""`bitllm convert`: write a model in another format, read back and compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitllm.cli.failures import ending_as_ctrl_c_does
from bitllm.cli.options import (
    Decorator,
    complete_model,
    device_option,
    json_option,
    option,
    together,
    verbose_option,
)
from bitllm.cli.terminal import emit, emit_json, note, progress

if TYPE_CHECKING:
    from bitllm.convert import Conversion, ConversionResult
    from bitllm.convert.verify import Verification
    from bitllm.formats.writers import WritePlan

__all__ = ["conversion_options", "convert", "write_converted"]


def _full_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return "huggingface" if value == "hf" else value


conversion_options: Decorator[Any] = together(
    option(
        "--to",
        type=click.Choice(("huggingface", "hf", "gguf", "mlx")),
        callback=_full_name,
        help="The format. Default: gguf if the target ends in .gguf, else huggingface.",
    ),
    option(
        "--type",
        "kind",
        type=click.Choice(("i2_s", "tq2_0", "tq1_0")),
        help="Type of the ternary matrices in a GGUF file. Default: i2_s.",
    ),
    option(
        "--convention",
        type=click.Choice(("multiply", "divide")),
        help="What huggingface models do with a weight scale. Default: as in the source.",
    ),
    option("--force", is_flag=True, help="Replace a file or model directory of that name."),
    option(
        "--verify/--no-verify",
        default=True,
        help="Read the result back and compare it with the source. Default: yes.",
    ),
    device_option,
    json_option,
    verbose_option,
)
"""The options of whatever writes a model in another format."""


@click.command()
@click.argument("source", metavar="SRC", shell_complete=complete_model)
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@conversion_options
def convert(source: str, target: Path, **options: Any) -> None:
    """Write a model in another format, read back and compared.

    SRC is a directory or file, or org/name[@revision] on the Hugging Face Hub. What DST's format
    cannot hold is refused before anything is written. DST appears when all of it is on the disk and
    every code, scale and dense value, and the logits of a short prompt, were found to be those of
    SRC; after an error, a full disk or Ctrl-C there is nothing, and an older DST is as it was.

    \b
    bitllm convert microsoft/bitnet-b1.58-2B-4T 2b.gguf
    bitllm convert 2b.gguf ./2b --to huggingface
    bitllm convert ./2b ./2b-mlx --to mlx
    """  # noqa: D301
    write_converted(source, target, **options)


def write_converted(
    source: str,
    target: Path,
    *,
    force: bool,
    verify: bool,
    device: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert a model and report on it, by the values of `conversion_options`."""
    from bitllm.convert import plan_conversion, run_conversion

    conversion = plan_conversion(source, target, replace=force, **options)
    if not as_json:
        emit("\n".join(_plan_lines(conversion)))
    with (
        ending_as_ctrl_c_does(),
        progress("writing") as writing,
        progress("verifying") as verifying,
    ):
        result = run_conversion(
            conversion, check=verify, device=device, writing=writing, verifying=verifying
        )
    if as_json:
        emit_json(_as_values(conversion, result))
    else:
        emit("\n".join(_result_lines(result)))
    for text in conversion.plan.notes:
        note(f"note: {text}")


def _plan_lines(conversion: Conversion) -> Iterator[str]:
    from bitllm.engine.memory_plan import format_bytes

    plan = conversion.plan
    yield f"from    {conversion.files.name} ({conversion.checkpoint.spec.architecture})"
    if conversion.losses:
        yield f"merged  {_merge_summary(conversion)}"
    yield f"to      {conversion.target} ({plan.format})"
    yield ""
    rows = [("tensor", "type", "count", "shape", "size")]
    rows += [
        (part, dtype, str(count), " x ".join(map(str, shape)), format_bytes(nbytes))
        for (part, dtype, shape), (count, nbytes) in _grouped(plan).items()
    ]
    rows.append(("all files", "", str(len(plan.tensors)), "", format_bytes(plan.nbytes)))
    width = max(len(row[0]) for row in rows)
    for part, dtype, count, shape, size in rows:
        yield f"{part:<{width}}  {dtype:<5}  {count:>5}  {shape:>14}  {size:>8}"
    if plan.errors:
        yield ""
        yield (
            f"scales  {len(plan.errors)} tensors are rounded, by {plan.largest_error:.2g} at most"
            " (relative)"
        )


def _merge_summary(conversion: Conversion) -> str:
    losses = conversion.losses.values()
    missing = sum(loss.missing for loss in losses) / len(losses)
    update = sum(loss.update for loss in losses) / len(losses)
    changed = sum(loss.changed for loss in losses) / len(losses)
    return (
        f"an adapter of {len(losses)} matrices, {update:.2g} of the size of the weights: rounding "
        f"changed {changed:.2%} of the codes and lost {missing:.0%} of the update (means)"
    )


def _grouped(plan: WritePlan) -> dict[tuple[str, str, tuple[int, ...]], tuple[int, int]]:
    """Return count and bytes of tensors that are alike in all layers, in the order of the files."""
    groups: dict[tuple[str, str, tuple[int, ...]], tuple[int, int]] = {}
    for tensor in plan.tensors:
        part = ".".join(piece for piece in tensor.name.split(".") if not piece.isdecimal())
        key = part.removeprefix("model.layers.").removeprefix("blk."), tensor.dtype, tensor.shape
        count, nbytes = groups.get(key, (0, 0))
        groups[key] = count + 1, nbytes + tensor.nbytes
    return groups


def _result_lines(result: ConversionResult) -> Iterator[str]:
    from bitllm.engine.memory_plan import format_bytes

    yield ""
    yield f"wrote   {result.target}, {format_bytes(result.nbytes)}"
    if result.verification is not None:
        yield f"read    {_verdict(result.verification)}"


def _verdict(found: Verification) -> str:
    scales = (
        "and scales equal"
        if found.scale_error == 0
        else f"equal, scales off by {found.scale_error:.2g} at most"
    )
    if found.logits_error is None:
        logits = f"no logits computed: {found.logits_skipped}"
    elif found.logits_error == 0:
        logits = "logits equal to the bit"
    else:
        logits = f"logits off by {found.logits_error:.2g} of the largest"
    return f"{found.matrices} matrices: codes {scales}; {found.dense} other tensors equal; {logits}"


def _as_values(conversion: Conversion, result: ConversionResult) -> dict[str, Any]:
    import dataclasses

    plan, found = conversion.plan, result.verification
    return {
        "source": {"name": conversion.files.name, "path": str(conversion.files.path)},
        "target": str(result.target),
        "format": plan.format,
        "bytes": result.nbytes,
        "files": [{"name": file.name, "bytes": file.nbytes} for file in plan.files],
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes}
            for t in plan.tensors
        ],
        "rounded": dict(plan.errors),
        "largest_error": plan.largest_error,
        "merge": {name: dataclasses.asdict(loss) for name, loss in conversion.losses.items()},
        "notes": list(plan.notes),
        "verification": None if found is None else dataclasses.asdict(found),
    }
