"""`bitllm train`: train a model by a recipe, and export it."""

from __future__ import annotations

from pathlib import Path

import click

from bitllm.cli.failures import ending_as_ctrl_c_does
from bitllm.cli.options import json_option, option, verbose_option
from bitllm.cli.terminal import emit, emit_json
from bitllm.errors import ConfigError

__all__ = ["train"]


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@option(
    "-o",
    "--out",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the run. Default: runs/ and the name of the recipe.",
)
@option("--resume", is_flag=True, help="Go on from the last checkpoint of the run.")
@json_option
@verbose_option
def train(recipe: Path, out: Path | None, resume: bool, as_json: bool) -> None:
    """Train a model by a recipe.

    Needs PyTorch: pip install 'bitllm[train]'. RECIPE is a TOML file that says everything: text,
    tokenizer, architecture, steps. The folder of the run gets the log, checkpoints to resume from,
    and at the end the model, which bitllm and transformers load. Progress goes to stderr, the
    path of the model to stdout. A run that was stopped and resumed ends in the same weights as one
    that was not.

    \b
    bitllm train recipes/demo.toml
    bitllm train recipes/demo.toml --resume
    """  # noqa: D301
    _require_torch()
    from bitllm.train.pipeline import run_watched
    from bitllm.train.recipe_file import load_recipe

    settings = load_recipe(recipe)
    folder = out or Path("runs") / settings.name
    with ending_as_ctrl_c_does():
        model = run_watched(settings, folder, resume)
    written = None if model is None else str(model)
    if as_json:
        emit_json({"recipe": settings.name, "run": str(folder), "model": written})
    elif written is not None:  # weights of a kind that is trained for comparison only
        emit(written)


def _require_torch() -> None:
    try:
        import bitllm.train.pipeline  # noqa: F401
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "torch":
            raise
        raise ConfigError(
            f"training needs PyTorch, which cannot be imported: {error}",
            hint="install it with `pip install 'bitllm[train]'`",
        ) from error
