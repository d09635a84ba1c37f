"""A corpus and a recipe so small that a test can train on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bitllm.train.pipeline import prepare_text
from bitllm.train.recipe import Recipe
from bitllm.train.recipe_file import recipe_from_dict

_SENTENCES = (
    "The cat sat on the mat and looked at the dog.",
    "A dog ran over the hill to see the cat.",
    "Rain fell on the hill; the mat was wet, the cat was not.",
)


def write_corpus(folder: Path) -> None:
    """Nine text files of a few sentences each."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(9):
        lines = [_SENTENCES[(index + line) % 3] for line in range(20)]
        (folder / f"text{index}.txt").write_text("\n".join(lines), encoding="utf-8")


def tiny_recipe(folder: Path, **training: Any) -> Recipe:
    """A recipe of about 30,000 parameters over the files that `write_corpus` wrote to `folder`."""
    values = {
        "name": "tiny",
        "text": {
            "source": "files",
            "files": [f"text{index}.txt" for index in range(9)],
            "held_out_percent": 30.0,
        },
        "tokenizer": {"vocab_size": 300},
        "model": {
            "hidden_size": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "ffn_size": 48,
            "context": 64,
        },
        "training": {
            "threads": 1,
            "steps": 30,
            "batch_size": 2,
            "sequence_length": 24,
            "learning_rate": 1e-2,
            "first_stage_end": 7e-3,
            "second_stage_start": 7e-3,
            "warmup_steps": 3,
            "log_every": 4,
            "evaluate_every": 12,
            "checkpoint_every": 7,
            **training,
        },
    }
    return dataclasses.replace(recipe_from_dict(values), folder=folder)


def prepare_tiny(folder: Path, **training: Any) -> Recipe:
    """Write corpus, tokenizer.json and shards/ into `folder`; return the recipe."""
    write_corpus(folder)
    recipe = tiny_recipe(folder, **training)
    prepare_text(recipe, folder)
    return recipe
