"""`python -m bitllm.train RECIPE [--out DIR] [--resume]`: from text to an exported model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bitllm.errors import BitllmError
from bitllm.train.pipeline import run_watched
from bitllm.train.recipe_file import load_recipe


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bitllm.train", description="Train a ternary model by a recipe."
    )
    parser.add_argument("recipe", type=Path, help="a recipe file (TOML)")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe)
        out = options.out or Path("runs") / recipe.name
        model = run_watched(recipe, out, options.resume)
    except BitllmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if model is not None:
        print(model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
