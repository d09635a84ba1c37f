"""Compare ways of training at a small scale: equal tokens, equal seeds, one thing changed.

    python benchmarks/science.py NAME [--steps 150] [--out DIR]

NAME is one of: sizes (ternary against full precision at three sizes), conversion (lambda warm-up on
and off when a dense model is made ternary), schedule (two-stage against cosine), bits (weights of
1, 1.58, 2 and 4 bits). Text is the documentation inside Python, the measure bits per byte of
modules that are held out. A table, then one line of JSON; with Matplotlib also NAME.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine

from bitllm.train.export import export_masters, trained_texts
from bitllm.train.loop import TrainingResult, train
from bitllm.train.pipeline import prepare_text
from bitllm.train.recipe import Recipe
from bitllm.train.recipe_file import recipe_from_dict

VOCAB, CONTEXT = 512, 128
Runs = Iterator[tuple[str, Recipe]]


def make_recipe(
    options: argparse.Namespace, hidden: int = 96, training: Any = None, **tables: Any
) -> Recipe:
    """Return the recipe of one run; `training` and `tables` are what it has of its own."""
    model = {
        "hidden_size": hidden, "layers": 2, "heads": hidden // 32, "kv_heads": hidden // 32,
        "head_dim": 32, "ffn_size": 3 * hidden, "context": CONTEXT,
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": "science",
        "text": {"source": "python", "held_out_percent": 1.0},
        "training": {
            "threads": 1, "steps": options.steps, "batch_size": 8, "sequence_length": CONTEXT,
            "learning_rate": 3e-3, "warmup_steps": 10, "seed": options.seed,
            "log_every": 10, "evaluate_every": options.steps, "checkpoint_every": options.steps,
            **(training or {}),
        },
    }  # fmt: skip
    if "start" not in tables:
        values |= {"model": model, "tokenizer": {"vocab_size": VOCAB}}
    return recipe_from_dict(values | tables)


def sizes(options: argparse.Namespace) -> Runs:
    """Ternary and full precision at three sizes."""
    for hidden in (64, 96, 160):
        for bits in ("dense", "1.58"):
            yield (
                f"{hidden} wide, {bits}",
                make_recipe(options, hidden, quantization={"weight_bits": bits}),
            )


def schedule(options: argparse.Namespace) -> Runs:
    """Two stages against a cosine, with the same peak and end."""
    for name in ("two_stage", "cosine"):
        yield name, make_recipe(options, training={"schedule": name})


def bits(options: argparse.Namespace) -> Runs:
    """Weights of a few bits, activations of 8."""
    for name in ("1", "1.58", "2", "4"):
        yield f"{name} bits", make_recipe(options, quantization={"weight_bits": name})


def conversion(options: argparse.Namespace) -> Runs:
    """A dense model made ternary at once, or by and by over half of the steps."""
    dense = make_recipe(options, quantization={"weight_bits": "dense"})
    yield "the dense model", dense
    # The model that the run before has left.
    start = {"model": str((options.out / "last").resolve())}
    calm = {"learning_rate": 1e-3, "first_stage_end": 7e-4, "second_stage_start": 7e-4}
    for name, steps in ("at once", 0), ("lambda warm-up", options.steps // 2):
        quantization = {"warmup_steps": steps}
        yield (
            f"made ternary, {name}",
            make_recipe(options, training=calm, start=start, quantization=quantization),
        )


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], Runs]] = {
    "sizes": sizes,
    "conversion": conversion,
    "schedule": schedule,
    "bits": bits,
}


def run(recipe: Recipe, out: Path, folder: str) -> TrainingResult:
    """Train by a recipe on the shards in `out`; a dense model is left in `out`/last."""
    result = train(recipe, out / "shards", out / folder, report=lambda line: None)
    if recipe.quantization.weight_bits == "dense":
        texts = trained_texts(out / "tokenizer.json", CONTEXT, recipe.export)
        export_masters(result.model, texts, out / "last")
    return result


def draw(name: str, curves: dict[str, tuple[float, ...]], path: Path) -> None:
    """Draw the training losses, where Matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, losses in curves.items():
        axes.plot([10 * (i + 1) for i in range(len(losses))], losses, label=label)
    axes.set(xlabel="step", ylabel="training loss, nats per token", title=name)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Small twins of training runs.")
    parser.add_argument("name", choices=sorted(EXPERIMENTS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where runs and picture go; default: nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        options.out = options.out or Path(temporary)
        prepare_text(make_recipe(options), options.out)
        rows, results, curves = [], {}, {}
        for index, (label, recipe) in enumerate(EXPERIMENTS[options.name](options)):
            began = time.monotonic()
            result = run(dataclasses.replace(recipe, folder=Path()), options.out, f"run{index}")
            seconds = time.monotonic() - began
            parameters = sum(p.numel() for p in result.model.parameters())
            told = f"{parameters / 1e6:.2f} M parameters, {seconds:.0f} s"
            rows.append((label, f"{result.held_out_bpb:.4f} bits/byte   {told}"))
            results[label] = {"bits_per_byte": result.held_out_bpb, "parameters": parameters}
            curves[label] = result.losses
        draw(options.name, curves, options.out / f"{options.name}.png")
    tokens = options.steps * 8 * CONTEXT
    head = [("experiment", f"{options.name}, {tokens} tokens a run, seed {options.seed}")]
    machine.report(head + rows, {"experiment": options.name, "tokens": tokens, "runs": results})


if __name__ == "__main__":
    main()
