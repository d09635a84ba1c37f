"""Adapters: the ternary model stays as it is, and PEFT's two files hold what was trained."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from batches import logits_of, prompt_ids
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.checkpoint import LinearSpec, TernaryMatrix
from bitllm.errors import ConfigError, NotTernaryError, UnsupportedModelError
from bitllm.formats import open_adapter, open_checkpoint
from bitllm.formats.writers.texts import read_texts
from bitllm.train.adapters import AdaptedLinear, adapted_model, save_adapter
from bitllm.train.bitlinear import BitLinear
from bitllm.train.export import export_model
from bitllm.train.loop import train
from bitllm.train.pipeline import run_recipe
from bitllm.train.recipe import AdapterSettings
from bitllm.train.recipe_file import recipe_from_dict
from bitllm.train.start import initial_model
from small_llama import write_llama
from synthetic import random_checkpoint, tiny_spec
from tiny_training import write_corpus


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe_of(folder, model="packed", **tables):
    values = {
        "name": "adapted",
        "start": {"model": model},
        "text": {
            "source": "files",
            "files": [f"text{i}.txt" for i in range(9)],
            "held_out_percent": 30.0,
        },
        "training": {
            "threads": 1, "steps": 16, "batch_size": 2, "sequence_length": 48, "warmup_steps": 2,
            "learning_rate": 1e-2, "log_every": 4, "evaluate_every": 8, "checkpoint_every": 5,
        },
    }  # fmt: skip
    values |= tables
    return dataclasses.replace(recipe_from_dict(values), folder=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed ternary model that was not trained, and text."""
    folder = tmp_path_factory.mktemp("adapters")
    write_llama(folder / "dense")
    write_corpus(folder)
    model = initial_model(recipe_of(folder, "dense"))
    texts = dataclasses.replace(read_texts(folder / "dense"), config=None)
    export_model(model, texts, folder / "packed")
    return folder


def test_an_adapter_begins_by_changing_nothing(folder):
    model = adapted_model(open_checkpoint(folder / "packed"), AdapterSettings(rank=4))
    plain = initial_model(recipe_of(folder, "dense"))
    with torch.no_grad():  # a packed folder holds what is dense in bfloat16
        for name, parameter in plain.named_parameters():
            if "_proj" not in name:
                parameter.copy_(parameter.bfloat16())
    ids = torch.arange(1, 50)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), plain(ids), rtol=1e-3, atol=1e-3)
    assert isinstance(plain.model.layers[0].mlp.up_proj, BitLinear)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 28
    assert all(".lora_" in name for name in trained)


def test_outputs_and_gradients_are_those_written_out():
    torch.manual_seed(4)
    codes = np.random.default_rng(4).integers(-1, 2, (6, 16)).astype(np.int8)
    for scales in np.float32(0.3), np.linspace(0.1, 2.0, 6, dtype=np.float32):
        matrix = TernaryMatrix.from_codes(codes, np.asarray(scales, np.float32))
        spec = LinearSpec(6, 16)
        layer = AdaptedLinear(matrix, spec, rank=3, alpha=6.0)
        torch.nn.init.normal_(layer.lora_B.weight)
        x = torch.randn(5, 16, requires_grad=True)
        upstream = torch.randn(5, 6)
        layer(x).backward(upstream)
        weight = torch.from_numpy(codes).double() * torch.tensor(scales).double().reshape(-1, 1)
        a = 127 / x.detach().double().abs().amax(1, keepdim=True)
        rounded = (x.detach().double() * a).round() / a
        update = 2.0 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        found = layer(x).detach().double()
        wanted = rounded @ weight.T + x.detach().double() @ update.T
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        wanted = upstream.double() @ (weight + update)
        torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_group_scales_are_refused():
    codes = np.ones((4, 16), np.int8)
    matrix = TernaryMatrix.from_codes(codes, np.ones((4, 2), np.float32), 8)
    with pytest.raises(UnsupportedModelError, match="group scales"):
        AdaptedLinear(matrix, LinearSpec(6, 16), rank=1, alpha=1.0)


def test_what_is_saved_is_what_was_trained(folder, tmp_path):
    settings = {"rank": 4, "alpha": 8.0, "targets": ["q", "v", "down"]}
    recipe = recipe_of(folder, adapter=settings)
    written = run_recipe(recipe, tmp_path / "run")
    assert written == tmp_path / "run" / "adapter"
    config = json.loads((written / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    assert config["base_model_name_or_path"] == "packed"
    tensors = load_file(written / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3
    result = train(recipe, tmp_path / "run" / "shards", tmp_path / "run", resume=True)
    assert result.losses[-1] < result.losses[0] - 0.05
    for name, parameter in result.model.named_parameters():
        if ".lora_" in name:
            found = tensors[f"base_model.model.{name}"]
            assert (found == parameter.detach().numpy()).all(), name
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].any()


def test_adding_the_update_to_the_weights_computes_the_same(folder, tmp_path):
    """The files, read by somebody else: W + alpha / r B A, on inputs that are not rounded."""
    recipe = recipe_of(folder, adapter={"rank": 2, "targets": ["q"]})
    written = run_recipe(recipe, tmp_path / "run")
    tensors = load_file(written / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = (tensors[f"{prefix}.lora_{part}.weight"] for part in "AB")
    checkpoint = open_checkpoint(folder / "packed")
    result = train(recipe, tmp_path / "run" / "shards", tmp_path / "run", resume=True)
    layer = result.model.model.layers[0].self_attn.q_proj
    layer.rounds = False
    matrix = checkpoint.ternary("layers.0.q")
    weight = matrix.codes() * matrix.scales + 32.0 / 2 * b @ a
    x = np.random.default_rng(5).standard_normal((3, 32)).astype(np.float32)
    found = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, x @ weight.T, rtol=1e-3, atol=1e-4)


def medians(decoder, model, slot):
    """Median over seven short texts of the normalised squared error, with and without a slot.

    Differences in the last bit may move an int8 code to the other side of a tie, and all behind it
    in that text; so it is the median that tells (see test_peft_oracle.py).
    """
    errors = []
    for seed in range(7):
        ids = prompt_ids(5, model.spec.vocab_size, seed)
        with torch.inference_mode():
            wanted = model(torch.tensor([ids]))[0].numpy()
        found = logits_of(decoder, ids, adapter=slot)
        errors.append(float(((found - wanted) ** 2).sum() / (wanted**2).sum()))
    return sorted(errors)[3]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_engine_computes_what_was_trained(folder, tmp_path, backend):
    settings = {"rank": 3, "alpha": 9.0, "targets": ["q", "o", "gate", "down"]}
    recipe = recipe_of(folder, adapter=settings)
    written = run_recipe(recipe, tmp_path / "run")
    result = train(recipe, tmp_path / "run" / "shards", tmp_path / "run", resume=True)
    options = LoadOptions(kv_dtype="fp32", threads=1)
    decoder = get_backend(backend).load(open_checkpoint(folder / "packed"), options)
    slot = decoder.load_adapter(open_adapter(written))
    assert medians(decoder, result.model, slot) < 1e-9
    assert medians(decoder, result.model, -1) > 1e-5  # the adapter does change the text


@pytest.mark.parametrize("switches", [{"linear_norm_eps": 1e-6}, {"bias": True}])
def test_updates_see_the_input_before_a_norm_of_the_linear(switches, tmp_path):
    checkpoint = random_checkpoint(tiny_spec(**switches))
    settings = AdapterSettings(rank=3, alpha=2.0)
    torch.manual_seed(6)
    model = adapted_model(checkpoint, settings)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter)
    written = save_adapter(model, settings, tmp_path / "adapter", "somewhere")
    decoder = get_backend("cpu").load(checkpoint, LoadOptions(kv_dtype="fp32", threads=1))
    slot = decoder.load_adapter(open_adapter(written))
    assert medians(decoder, model, slot) < 1e-9
    assert medians(decoder, model, -1) > 1e-3


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"quantization": {"weight_bits": "4"}}, "no .quantization. beside it"),
        ({"distillation": {"teacher": "dense"}}, "do not go together"),
        ({"start": {"model": "packed", "sub_norms": True}}, "no start.sub_norms"),
    ],
)
def test_adapters_leave_the_model_as_it_is(folder, tables, message):
    with pytest.raises(ConfigError, match=message):
        recipe_of(folder, adapter={"rank": 2}, **tables)


def test_dense_models_take_no_ternary_adapter(folder, tmp_path):
    recipe = recipe_of(folder, "dense", adapter={"rank": 2})
    with pytest.raises(NotTernaryError, match="not a ternary network"):
        run_recipe(recipe, tmp_path / "run")
