"""The model in the package: small, complete, documented, and what its recipe makes."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest

import bitllm
from bitllm.formats import open_checkpoint, read_generation_config
from bitllm.tokenizer import load_tokenizer
from bitllm.train.documents import documents_sha256
from bitllm.train.loop import train
from bitllm.train.pipeline import collect_documents, exported_bits_per_byte, prepare_text
from bitllm.train.recipe import Recipe
from bitllm.train.recipe_file import load_recipe

DEMO = Path(bitllm.__file__).parent / "demo"
RECIPES = Path(__file__).parents[1] / "recipes"
CARD = (DEMO / "MODEL_CARD.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(RECIPES / "demo.toml")


def card_figure(name: str) -> float:
    found = re.search(rf"^\| {re.escape(name)} \| ([\d.,]+)", CARD, re.MULTILINE)
    assert found, name
    return float(found[1].replace(",", ""))


def test_it_is_small():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 4_000_000


def test_it_is_complete():
    assert {path.name for path in DEMO.iterdir()} == {
        "LICENSE",
        "MODEL_CARD.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_has_the_architecture_of_its_recipe(recipe):
    checkpoint = open_checkpoint(DEMO)
    assert checkpoint.spec == recipe.spec()
    assert card_figure("parameters") == checkpoint.spec.parameter_count()
    for name, _ in checkpoint.spec.linear_names():
        codes = checkpoint.ternary(name).codes()
        assert {-1, 0, 1} == set(codes.ravel().tolist()), name


def test_the_card_names_recipe_and_text_by_their_hashes(recipe):
    assert f"`{recipe.sha256}`" in CARD
    assert f"`{recipe.text.sha256}`" in CARD
    assert f"Python {recipe.text.python}" in CARD


def test_its_tokenizer_and_defaults_belong_to_it(recipe):
    tokenizer = load_tokenizer(DEMO)
    defaults = read_generation_config(DEMO)
    config = json.loads((DEMO / "config.json").read_text())
    assert tokenizer.vocab_size == config["vocab_size"] == recipe.tokenizer.vocab_size
    assert tokenizer.bos_id == config["bos_token_id"]
    assert set(defaults.eos_token_ids) == tokenizer.stop_ids
    assert defaults.temperature == recipe.export.temperature
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    assert tokenizer.decode(prompt, skip_special=False) == (
        "<|begin_of_text|><|user|>Hello<|end_of_turn|><|assistant|>"
    )


def for_this_python(recipe: Recipe) -> tuple[Recipe, bool]:
    """The recipe with the text of the running Python, and whether that is the pinned text."""
    unpinned = dataclasses.replace(recipe.text, sha256=None)
    found = documents_sha256(collect_documents(unpinned, recipe.folder))
    return dataclasses.replace(recipe, text=unpinned), found == recipe.text.sha256


@pytest.mark.slow
def test_a_rebuild_takes_the_path_of_the_recorded_loss(recipe, tmp_path):
    with (RECIPES / "demo.log.csv").open(newline="") as file:
        recorded = [float(row["loss"]) for row in csv.DictReader(file)]
    recipe, same_text = for_this_python(recipe)
    prepare_text(recipe, tmp_path)
    # One thread: two that wait for each other are slow on a busy machine.
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, threads=1))
    steps = 2 * recipe.training.log_every
    result = train(
        recipe, tmp_path / "shards", tmp_path, stop_after=steps, report=lambda line: None
    )
    # Other text of the same kind shuffles into other batches.
    tolerance = 0.05 if same_text else 0.4
    assert result.losses == pytest.approx(recorded[:2], abs=tolerance)


@pytest.mark.slow
def test_its_bits_per_byte_are_those_of_its_card(recipe, tmp_path):
    recipe, same_text = for_this_python(recipe)
    prepare_text(recipe, tmp_path)
    if same_text:
        tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
        assert tokenizer == json.loads((DEMO / "tokenizer.json").read_text())
    _, found = exported_bits_per_byte(DEMO, recipe, tmp_path / "shards")
    recorded = card_figure("held-out bits per byte, exported")
    assert found == pytest.approx(recorded, abs=0.002 if same_text else 0.5)
    in_training = card_figure("held-out bits per byte, in training")
    assert abs(recorded - in_training) <= 0.002
