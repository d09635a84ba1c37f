"""`bitllm export`: write what a training run made in the format that it is wanted in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bitllm.cli.convert import conversion_options, write_converted
from bitllm.cli.options import complete_model, option
from bitllm.errors import ModelNotFoundError

__all__ = ["export"]

_EXPORTED = "model"
_STATE = "checkpoint.pt"


@click.command()
@click.argument("source", metavar="RUN", shell_complete=complete_model)
@option(
    "-o",
    "--out",
    "target",
    metavar="DST",
    type=click.Path(path_type=Path),
    required=True,
    help="The file or directory to write.",
)
@conversion_options
def export(source: str, target: Path, **options: Any) -> None:
    """Write the model of a training run in the format it is wanted in.

    RUN is the folder of a finished run of `bitllm train`, or any model that `bitllm convert` takes;
    DST is written as there: whole or not at all, read back and compared.

    \b
    bitllm export runs/demo --to gguf -o demo.gguf
    bitllm export runs/demo --to hf -o ./demo
    """  # noqa: D301
    write_converted(_model_of(source), target, **options)


def _model_of(source: str) -> str:
    """Return the model that a run has written, or the source itself if it is no run.

    Raises:
        ModelNotFoundError: the run has not ended.
    """
    folder = Path(source).expanduser()
    if (folder / _EXPORTED / "config.json").is_file():
        return str(folder / _EXPORTED)
    if (folder / _STATE).is_file():
        raise ModelNotFoundError(
            f"{source}: this run has not come to its end, and so has written no model",
            hint=f"`bitllm train RECIPE --out {source} --resume` goes on with it",
        )
    return source
