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
_ADAPTER, _ADAPTER_CONFIG = "adapter", "adapter_config.json"


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
@option(
    "--merge",
    "base",
    metavar="MODEL",
    shell_complete=complete_model,
    help="RUN trained an adapter of this ternary model: add it to the weights, and round those.",
)
@conversion_options
def export(source: str, target: Path, base: str | None, **options: Any) -> None:
    """Write the model of a training run in the format it is wanted in.

    RUN is the folder of a finished run of `bitllm train`, or any model that `bitllm convert` takes;
    DST is written as there: whole or not at all, read back and compared.

    \b
    bitllm export runs/demo --to gguf -o demo.gguf
    bitllm export runs/demo --to hf -o ./demo
    bitllm export runs/adapter --merge microsoft/bitnet-b1.58-2B-4T -o ./merged
    """  # noqa: D301
    if base is not None:
        write_converted(base, target, adapter=_adapter_of(source), **options)
    else:
        write_converted(_model_of(source), target, **options)


def _adapter_of(source: str) -> Path:
    """Return the directory of the adapter that a run has written, or the source itself."""
    folder = Path(source).expanduser()
    return folder / _ADAPTER if (folder / _ADAPTER / _ADAPTER_CONFIG).is_file() else folder


def _model_of(source: str) -> str:
    """Return the model that a run has written, or the source itself if it is no run.

    Raises:
        ModelNotFoundError: the run has not ended, or it is one of an adapter.
    """
    folder = Path(source).expanduser()
    if (folder / _EXPORTED / "config.json").is_file():
        return str(folder / _EXPORTED)
    if (_adapter_of(source) / _ADAPTER_CONFIG).is_file():
        raise ModelNotFoundError(
            f"{source}: this is an adapter, not a model",
            hint="add --merge MODEL, the model it was trained on; or load it with "
            "LLM.load_adapter, which loses nothing",
        )
    if (folder / _STATE).is_file():
        raise ModelNotFoundError(
            f"{source}: this run has not come to its end, and so has written no model",
            hint=f"`bitllm train RECIPE --out {source} --resume` goes on with it",
        )
    return source
