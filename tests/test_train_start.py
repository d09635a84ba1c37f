"""Runs that start from a model: weights arrive as they are, and what is trained is what runs."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from batches import logits_of
from bitllm.backends.base import LoadOptions
from bitllm.backends.reference import ReferenceBackend
from bitllm.errors import BitllmError, ConfigError, TensorShapeError, UnsupportedModelError
from bitllm.formats import open_checkpoint
from bitllm.formats.writers.texts import read_texts
from bitllm.train.export import export_masters, export_model
from bitllm.train.in_place import set_strength
from bitllm.train.loop import train
from bitllm.train.pipeline import run_recipe
from bitllm.train.quantizers import quantize_weights
from bitllm.train.recipe_file import recipe_from_dict
from bitllm.train.start import initial_model, open_dense, teacher_model
from small_llama import write_llama
from tiny_training import write_corpus

MODELS = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
    "qwen2": {"model": Qwen2ForCausalLM, "config": Qwen2Config},
    "qwen3": {"model": Qwen3ForCausalLM, "config": Qwen3Config, "head_dim": 8},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe_of(folder, **tables):
    values = {
        "name": "tuned",
        "start": {"model": "dense"},
        "text": {
            "source": "files",
            "files": [f"text{i}.txt" for i in range(9)],
            "held_out_percent": 30.0,
        },
        "training": {
            "threads": 1, "steps": 12, "batch_size": 2, "sequence_length": 48, "warmup_steps": 2,
            "learning_rate": 1e-2, "log_every": 4, "evaluate_every": 6, "checkpoint_every": 5,
        },
    }  # fmt: skip
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table} if isinstance(table, dict) else table
    return dataclasses.replace(recipe_from_dict(values), folder=folder)


@pytest.mark.parametrize("kind", MODELS)
def test_a_dense_model_computes_what_transformers_computes(kind, tmp_path):
    theirs = write_llama(tmp_path / "dense", **MODELS[kind]).eval()
    ours = teacher_model("dense", tmp_path)
    ids = torch.arange(1, 60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_with_strength_zero_training_begins_at_the_dense_model(tmp_path):
    theirs = write_llama(tmp_path / "dense").eval()
    model = initial_model(recipe_of(tmp_path, quantization={"warmup_steps": 5}))
    ids = torch.arange(1, 60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        set_strength(model, 1.0)
        assert not torch.allclose(model(ids), theirs(ids).logits, rtol=1e-2, atol=1e-2)


def test_sub_norms_make_a_model_of_the_bitnet_kind(tmp_path):
    write_llama(tmp_path / "dense")
    recipe = recipe_of(tmp_path, start={"sub_norms": True})
    model = initial_model(recipe)
    assert model.spec.architecture == "BitNetForCausalLM"
    assert (model.model.layers[0].mlp.ffn_sub_norm.weight == 1).all()
    dense = open_dense(tmp_path / "dense")
    stored = dense.files["model.layers.1.mlp.up_proj.weight"].dense(
        "model.layers.1.mlp.up_proj.weight"
    )
    found = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    assert (found == stored.to_float32()).all()


@pytest.mark.parametrize("tables", [
    {"quantization": {"warmup_steps": 6}},
    {"start": {"sub_norms": True}, "training": {"document_mask": True, "precision": "bf16"}},
    {"training": {"optimizer": "muon", "ema": 0.9, "accumulation": 2}},
    {"distillation": {"teacher": "dense"}, "start": {"sub_norms": True}},
])  # fmt: skip
def test_what_is_trained_is_what_runs(tables, tmp_path, capsys):
    """Continued training, from the recipe to the exported model in a decoder."""
    write_llama(tmp_path / "dense")
    write_corpus(tmp_path)
    folder = run_recipe(recipe_of(tmp_path, **tables), tmp_path / "run")
    told = capsys.readouterr().err.splitlines()[-1]
    gap = float(told.split("gap ")[1].split(")")[0])
    assert abs(gap) < 0.005, told
    masters = open_dense(tmp_path / "run" / "masters")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = torch.from_numpy(masters.files[name].dense(name).to_float32().copy())
    codes = open_checkpoint(folder).ternary("layers.1.up").codes()
    assert (codes == quantize_weights(weight)[0].numpy().astype(np.int8)).all()
    assert (
        open_checkpoint(tmp_path / "run" / "masters").ternary("layers.1.up").codes() == codes
    ).all()


def test_training_goes_on_from_the_masters_of_a_run(tmp_path):
    write_llama(tmp_path / "dense")
    write_corpus(tmp_path)
    first = recipe_of(tmp_path)
    run_recipe(first, tmp_path / "run")
    trained = train(first, tmp_path / "run" / "shards", tmp_path / "run", resume=True).model
    again = initial_model(recipe_of(tmp_path, start={"model": "run/masters"}))
    state = trained.state_dict()
    assert set(state) == set(again.state_dict())
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_weights_for_comparison_are_measured_and_not_exported(tmp_path):
    write_llama(tmp_path / "dense")
    write_corpus(tmp_path)
    for bits in ("dense", "4"):
        recipe = recipe_of(tmp_path, quantization={"weight_bits": bits})
        assert run_recipe(recipe, tmp_path / bits) is None
        assert not (tmp_path / bits / "model").exists()
        assert (tmp_path / bits / "log.csv").exists()


def test_rounded_weights_are_no_start(tmp_path):
    write_llama(tmp_path / "dense")
    write_corpus(tmp_path)
    run_recipe(recipe_of(tmp_path), tmp_path / "run")
    with pytest.raises(UnsupportedModelError, match="its masters are not there") as caught:
        initial_model(recipe_of(tmp_path, start={"model": "run/model"}))
    assert "adapter" in caught.value.hint


def test_weights_of_another_shape_are_refused(tmp_path):
    write_llama(tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "intermediate_size": 44}))
    with pytest.raises(TensorShapeError, match=r"gate_proj.weight' should be .* \[44, 32\]"):
        initial_model(recipe_of(tmp_path))


def test_no_such_model_is_said(tmp_path):
    with pytest.raises(BitllmError, match="there is no model"):
        initial_model(recipe_of(tmp_path, start={"model": "./nothing-here"}))


def test_a_text_is_read_with_the_tokenizer_of_the_model(tmp_path):
    write_llama(tmp_path / "dense", vocab_size=250)
    write_corpus(tmp_path)
    with pytest.raises(ConfigError, match="the shards have 261 ids, the model has 250"):
        run_recipe(recipe_of(tmp_path), tmp_path / "run")


def test_packed_weights_compute_what_was_trained(tmp_path):
    write_llama(tmp_path / "dense")
    model = initial_model(recipe_of(tmp_path))
    texts = dataclasses.replace(read_texts(tmp_path / "dense"), config=None)
    export_masters(model, texts, tmp_path / "masters")
    fields = json.loads((tmp_path / "masters" / "config.json").read_text())
    assert fields["quantization_config"]["quantization_mode"] == "online"
    export_model(model, texts, tmp_path / "packed")
    ids = list(range(1, 40))
    options = LoadOptions(kv_tokens=64, kv_dtype="fp32")
    with torch.inference_mode():
        wanted = model(torch.tensor([ids]))[0].numpy()
    found = logits_of(ReferenceBackend().load(open_checkpoint(tmp_path / "packed"), options), ids)
    assert ((found - wanted) ** 2).sum() / (wanted**2).sum() <= 1e-4
