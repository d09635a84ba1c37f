"""Recipes: what a file may say, what it may not, and the schedule that it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitllm.errors import ConfigError
from bitllm.train.recipe import QuantizationSettings, Recipe, TrainingSettings
from bitllm.train.recipe_file import load_recipe, recipe_from_dict

SMALLEST = {"name": "m", "training": {"steps": 100}}


def with_values(**tables):
    return {**SMALLEST, **tables}


def training(**values) -> TrainingSettings:
    return TrainingSettings(**{"steps": 1000, "warmup_steps": 100, **values})


def test_defaults_fill_what_is_not_said():
    recipe = recipe_from_dict(SMALLEST)
    assert recipe == Recipe("m", TrainingSettings(steps=100))


def test_values_arrive_in_their_types():
    tables = {
        "training": {"steps": 10, "warmup_steps": 1, "learning_rate": 1, "betas": [0.5, 0.75]},
        "text": {"source": "files", "files": ["a", "b"], "sha256": "00"},
        "model": {"activation": "silu", "tied_head": False},
    }
    recipe = recipe_from_dict(with_values(**tables))
    assert isinstance(recipe.training.learning_rate, float)
    assert recipe.training.betas == (0.5, 0.75)
    assert recipe.text.files == ("a", "b")
    assert (recipe.model.activation, recipe.model.tied_head) == ("silu", False)


@pytest.mark.parametrize(
    ("tables", "message", "hint"),
    [
        ({"nmae": "x"}, "unknown key nmae", "did you mean name?"),
        ({"training": {"step": 1}}, "unknown key training.step", "did you mean training.steps?"),
        ({"model": {"zzz": 1}}, "unknown key model.zzz", "known keys: hidden_size, layers"),
        ({"sha256": "0"}, "unknown key sha256", "known keys"),
        ({"training": {}}, "training.steps is missing", None),
        ({"training": 3}, r"\[training\] must be a table, got 3", None),
        ({"training": {"steps": 1.5}}, "training.steps must be of type int, got 1.5", None),
        ({"training": {"steps": True}}, "training.steps must be of type int, got True", None),
        ({"training": {"steps": "9"}}, "training.steps must be of type int, got '9'", None),
        ({"model": {"tied_head": 1}}, "model.tied_head must be of type bool, got 1", None),
        ({"model": {"rope_theta": float("nan")}}, "model.rope_theta must be a finite", None),
        ({"model": {"activation": "tanh"}}, "model.activation must be one of 'relu2'", None),
        ({"model": {"heads": 0}}, "model.heads must be positive", None),
        ({"model": {"context": 64}}, "training.sequence_length 512 is above", None),
        ({"text": {"files": "a"}}, "text.files must be a list, got 'a'", None),
        ({"text": {"files": ["a"]}}, "text.files goes with", None),
        ({"text": {"source": "files"}}, "text.files goes with", None),
        ({"text": {"held_out_percent": 100}}, "text.held_out_percent must lie in", None),
        ({"training": {"steps": 100, "betas": [0.9]}}, "training.betas must have 2", None),
        ({"training": {"steps": 100, "betas": [0.9, 1]}}, "training.betas must lie in", None),
        ({"training": {"steps": 0}}, "training.steps must be positive", None),
        ({"training": {"steps": 100, "threads": 0}}, "training.threads must be positive", None),
        ({"training": {"steps": 50}}, "training.warmup_steps must be below", None),
        (
            {"training": {"steps": 100, "weight_decay": -0.1}},
            "training.weight_decay must not be negative",
            None,
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(tables, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        recipe_from_dict(with_values(**tables))
    if hint:
        assert hint in caught.value.hint


def test_a_recipe_needs_a_name():
    with pytest.raises(ConfigError, match="name is missing"):
        recipe_from_dict({"training": {"steps": 100}})


def test_a_file_remembers_its_folder_and_hash(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('name = "m"\n[training]\nsteps = 100\n')
    recipe = load_recipe(path)
    assert recipe.folder == tmp_path
    assert len(recipe.sha256) == 64
    path.write_text(path.read_text() + "# more\n")
    assert load_recipe(path).sha256 != recipe.sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read this recipe: No such file"),
        (b"name = ", "not valid TOML"),
        (b"\xff", "not valid TOML"),
        (b'name = "m"\nstep = 1\n', "unknown key step"),
    ],
)
def test_errors_name_the_file(tmp_path, content, message):
    path = tmp_path / "r.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path)
    assert str(path) in caught.value.message


def test_the_learning_rate_has_two_stages():
    settings = training(
        learning_rate=3.0, first_stage_end=2.0, second_stage_start=1.5, final_learning_rate=0.5
    )
    rates = [settings.learning_rate_at(step) for step in (0, 49, 99, 100, 300, 499, 500, 750)]
    assert rates == pytest.approx([0.03, 1.5, 3.0, 3.0, 2.5, 2.0025, 1.5, 1.0])
    assert settings.learning_rate_at(999) == pytest.approx(0.502)


def test_the_learning_rate_needs_no_warm_up():
    assert training(warmup_steps=0, learning_rate=3.0).learning_rate_at(0) == 3.0


def test_weight_decay_ends_at_the_middle():
    settings = training(weight_decay=0.1)
    assert [settings.weight_decay_at(step) for step in (0, 499, 500, 999)] == [0.1, 0.1, 0.0, 0.0]


def test_the_spec_is_the_one_asked_for():
    model = {"hidden_size": 32, "layers": 3, "heads": 6, "kv_heads": 2, "head_dim": 8}
    recipe = recipe_from_dict(with_values(model=model | {"ffn_size": 40}))
    spec = recipe.spec()
    assert (spec.vocab_size, spec.hidden_size, len(spec.layers)) == (4096, 32, 3)
    layer = spec.layers[0]
    assert (layer.q.out_features, layer.k.out_features, layer.o.in_features) == (48, 16, 48)
    assert (layer.gate.out_features, layer.down.in_features) == (40, 40)
    assert layer.query_scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("recipes/*.toml")))
def test_recipes_of_this_project_are_valid(path):
    assert load_recipe(path).name


def test_a_cosine_falls_from_peak_to_end():
    settings = training(
        schedule="cosine", warmup_steps=100, learning_rate=3.0, final_learning_rate=1.0
    )
    rates = [settings.learning_rate_at(step) for step in (0, 99, 100, 550)]
    assert rates == pytest.approx([0.03, 3.0, 3.0, 2.0])
    assert settings.learning_rate_at(999) == pytest.approx(1.0, abs=1e-4)
    assert settings.weight_decay_at(999) == settings.weight_decay


def test_a_constant_rate_stays():
    settings = training(schedule="constant", warmup_steps=100, learning_rate=3.0)
    assert [settings.learning_rate_at(step) for step in (49, 100, 999)] == [1.5, 3.0, 3.0]


def test_the_strength_of_the_rounding_rises_to_one():
    linear = QuantizationSettings(warmup_steps=4)
    assert [linear.strength_at(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    curve = QuantizationSettings(warmup_steps=100, warmup_shape="sigmoid")
    found = [curve.strength_at(step) for step in range(101)]
    assert (found[0], found[50], found[100]) == (0.0, pytest.approx(0.5), 1.0)
    assert found == sorted(found)
    assert found[10] < 0.1
    assert QuantizationSettings().strength_at(0) == 1.0


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"start": {"model": "x"}, "model": {"layers": 2}}, r"\[start\] names a model"),
        ({"start": {}}, "start.model is missing"),
        ({"adapter": {"rank": 4}}, r"\[adapter\] needs a ternary model"),
        ({"start": {"model": "x"}, "adapter": {"rank": 0}}, "adapter.rank must be positive"),
        ({"start": {"model": "x"}, "adapter": {"targets": []}}, "targets names no projection"),
        ({"start": {"model": "x"}, "adapter": {"targets": ["head"]}}, "must be one of 'q'"),
        ({"quantization": {"weight_bits": "3"}}, "quantization.weight_bits must be one of"),
        ({"quantization": {"warmup_steps": -1}}, "warmup_steps must not be negative"),
        ({"distillation": {"teacher": "x", "temperature": 0}}, "temperature must be positive"),
        ({"distillation": {"teacher": "x", "logits_weight": -1}}, "must not be negative"),
    ],
)
def test_tables_that_contradict_themselves_or_others(tables, message):
    with pytest.raises(ConfigError, match=message):
        recipe_from_dict(with_values(**tables))
