"""The exported folder: the codes of the model, read back by bitllm and by transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitNetForCausalLM
from transformers.quantizers import quantizer_bitnet

from batches import logits_of, prompt_ids
from bitllm import ternary
from bitllm.backends.base import LoadOptions
from bitllm.backends.reference import ReferenceBackend
from bitllm.checkpoint import RopeSpec
from bitllm.errors import ConversionError, UnsupportedModelError
from bitllm.formats import open_checkpoint, read_generation_config
from bitllm.formats.writers.config import huggingface_config
from bitllm.tokenizer import load_tokenizer
from bitllm.train.export import export_model, trained_texts
from bitllm.train.export_check import LARGEST_GAP, check_codes, describe_gap
from bitllm.train.model import TernaryDecoder
from bitllm.train.pipeline import run_recipe
from bitllm.train.quantizers import quantize_weights
from bitllm.train.recipe import ExportSettings, TextSettings
from bitllm.train.recipe_file import load_recipe
from tiny_training import prepare_tiny
from torch_checkpoint import torch_checkpoint

# Run what transformers compiles as it is written: nothing is gained at these sizes.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch, "compile", lambda function: function)
    from transformers.integrations import bitnet as hf


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["tied", "untied_silu"])
def exported(request, tmp_path_factory):
    """A model of random weights whose dense values bfloat16 can hold, and its folder."""
    folder = tmp_path_factory.mktemp("export")
    recipe = prepare_tiny(folder)
    if request.param == "untied_silu":
        settings = dataclasses.replace(recipe.model, tied_head=False, activation="silu")
        recipe = dataclasses.replace(recipe, model=settings)
    torch.manual_seed(3)
    model = TernaryDecoder(recipe.spec()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(10)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
                parameter.copy_(parameter.bfloat16())
    export_model(model, texts_of(folder), folder / "model")
    return model, folder / "model"


def texts_of(folder, **settings):
    path = folder / "tokenizer.json"
    return trained_texts(path, 64, ExportSettings(**settings))


def test_codes_and_scales_come_back_equal(exported):
    model, folder = exported
    wanted, found = torch_checkpoint(model), open_checkpoint(folder)
    names = [name for name, _ in model.spec.linear_names()]
    assert len(names) == 14
    for name in names:
        matrix, original = found.ternary(name), wanted.ternary(name)
        assert (matrix.codes() == original.codes()).all(), name
        assert (matrix.scales == original.scales).all(), name


def test_codes_are_those_of_the_number_format(exported):
    model, folder = exported
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight").detach()
    codes, _ = ternary.quantize_weights(weight.numpy())
    assert (open_checkpoint(folder).ternary("layers.1.down").codes() == codes).all()


def test_the_architecture_comes_back_equal(exported):
    model, folder = exported
    assert open_checkpoint(folder).spec == model.spec


def test_the_reference_decoder_computes_the_logits_of_torch(exported):
    model, folder = exported
    ids = prompt_ids(50, model.spec.vocab_size)
    with torch.inference_mode():
        wanted = model(torch.tensor([ids]))[0].numpy()
    options = LoadOptions(kv_tokens=64, kv_dtype="fp32")
    found = logits_of(ReferenceBackend().load(open_checkpoint(folder), options), ids)
    assert ((found - wanted) ** 2).sum() / (wanted**2).sum() <= 1e-4


def test_transformers_computes_the_logits_of_torch(exported, monkeypatch):
    """The folder as it stands, through transformers' own loader."""
    model, folder = exported
    # Its quantizer asks for accelerate, which it needs to spread a model over devices only.
    monkeypatch.setattr(quantizer_bitnet, "is_accelerate_available", lambda: True)
    other, report = BitNetForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert isinstance(other.model.layers[0].mlp.down_proj, hf.AutoBitLinear)
    other = torch.nn.Module.float(other)  # its own float() refuses quantised models
    ids = torch.tensor([prompt_ids(50, model.spec.vocab_size)])
    with torch.inference_mode():
        wanted, found = model(ids)[0], other(ids).logits[0]
    assert ((found - wanted) ** 2).sum() / (wanted**2).sum() <= 1e-4


def test_generation_defaults_and_stop_ids(exported):
    _, folder = exported
    defaults = read_generation_config(folder)
    assert (defaults.temperature, defaults.top_p, defaults.eos_token_ids) == (0.7, 0.9, (1, 2))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id == 0
    assert tokenizer.stop_ids == {1, 2}
    assert tokenizer.has_chat_template


def test_an_export_replaces_an_older_one_whole(exported, tmp_path):
    model, folder = exported
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale.txt").write_text("old")
    export_model(model, texts_of(folder, temperature=0.0), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert {path.name for path in target.iterdir()} == {path.name for path in folder.iterdir()}
    assert json.loads((target / "generation_config.json").read_text())["do_sample"] is False


def test_weights_are_readable_by_everyone(exported):
    assert (exported[1] / "model.safetensors").stat().st_mode & 0o777 == 0o644


def with_layer(spec, **changes):
    layer = dataclasses.replace(spec.layers[0], **changes)
    return dataclasses.replace(spec, layers=(layer,) * len(spec.layers))


def with_linear(spec, **changes):
    return with_layer(spec, q=dataclasses.replace(spec.layers[0].q, **changes))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda s: with_layer(s, attn_sub_norm=False), "missing norms"),
        (lambda s: with_layer(s, qk_norm=True), "q/k norms"),
        (lambda s: with_layer(s, sliding_window=8), "sliding window"),
        (lambda s: with_layer(s, rope=RopeSpec(1e4, 4)), "a part of the head"),
        (lambda s: with_layer(s, query_scale=1.0), "query scale"),
        (lambda s: with_layer(s, norm_eps=1e-6), "two norm epsilons"),
        (lambda s: with_linear(s, bias=True), "norms or biases"),
        (lambda s: with_linear(s, activation_bits=None), "not int8"),
        (lambda s: with_linear(s, out_features=30), "no multiple of 4"),
        (lambda s: dataclasses.replace(s, embedding_scale=2.0), "embedding scale"),
        (
            lambda s: dataclasses.replace(
                s, layers=(*s.layers, with_linear(s, bias=True).layers[0])
            ),
            "layers that differ",
        ),
    ],
)
def test_what_the_format_cannot_say_is_refused(exported, change, what):
    with pytest.raises(UnsupportedModelError, match=what):
        huggingface_config(change(exported[0].spec))


def test_scales_are_stored_as_bfloat16(exported):
    model, folder = exported
    source = open_checkpoint(folder).ternary("layers.0.q").source_scales
    _, scale = quantize_weights(model.get_parameter("model.layers.0.self_attn.q_proj.weight"))
    assert source.dtype == "bf16"
    assert source.to_float32().ravel()[0] == np.float32(scale.item())


def test_an_export_that_differs_in_one_code_or_scale_is_no_export(exported, tmp_path):
    model, folder = exported
    assert check_codes(model, folder) == 14
    tensors = load_file(folder / "model.safetensors")
    for name, what in ("weight", "codes of layers.1.down"), ("weight_scale", "scales of layers.1"):
        shutil.copytree(folder, tmp_path / name)
        changed = {key: value.clone() for key, value in tensors.items()}
        value = changed[f"model.layers.1.mlp.down_proj.{name}"].view(-1)
        value[3 if name == "weight" else 0] += 1 if value[0] % 4 < 2 or name != "weight" else -1
        save_file(changed, tmp_path / name / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConversionError, match=what):
            check_codes(model, tmp_path / name)


def test_a_gap_is_told_and_a_large_one_is_a_warning():
    assert "gap +0.00100)" in describe_gap(1.5, 1.501, "cpu", 14)
    assert "warning" not in describe_gap(1.5, 1.501, "cpu", 14)
    assert "warning: the gap is above 0.002" in describe_gap(1.5, 1.4969, "cpu", 14)


@pytest.mark.slow
def test_the_gap_of_a_model_of_demo_size_is_small(tmp_path, capsys):
    """Trained for a few steps, packed, and measured by the engine's decoder."""
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "demo.toml")
    training = dataclasses.replace(
        recipe.training, steps=6, batch_size=1, warmup_steps=2, threads=1
    )
    text = TextSettings(held_out_percent=0.5)
    run_recipe(dataclasses.replace(recipe, training=training, text=text), tmp_path)
    told = capsys.readouterr().err
    assert "21 matrices, codes and scales equal" in told
    assert abs(float(told.split("gap ")[1].split(")")[0])) <= LARGEST_GAP, told
