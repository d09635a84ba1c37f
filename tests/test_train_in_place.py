"""Any model made one of few bits in place: names and objects stay, and it trains as before."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import bitllm.train
from bitllm.errors import BackendUnavailableError, ConfigError
from bitllm.formats import open_checkpoint
from bitllm.train import BitLinear, dequantize_model, quantize_model, set_strength
from bitllm.train.model import TernaryDecoder
from bitllm.train.quantizers import quantize_weights
from tiny_training import tiny_recipe

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "bitnet": (BitNetForCausalLM, BitNetConfig, {}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(kind, seed=1):
    torch.manual_seed(seed)
    model, config, options = MODELS[kind]
    return model(config(**SIZES, **options))


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_transformers_keep_names_and_objects(kind):
    model = make(kind)
    before = list(model.named_parameters())
    state = set(model.state_dict())
    report = quantize_model(model)
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(new is old for (_, new), (_, old) in zip(after, before, strict=True))
    assert set(model.state_dict()) == state
    assert len(report.replaced) == 14
    assert list(report.skipped) == ["lm_head"]
    assert report.parameters == sum(p.numel() for _, p in before)
    projections = [p for name, p in before if name.endswith("_proj.weight")]
    assert report.quantized_parameters == sum(p.numel() for p in projections)
    assert isinstance(model.model.layers[1].mlp.down_proj, BitLinear)
    ids = torch.arange(12)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in projections)


def test_our_own_decoder_counts_as_quantised_already(tmp_path):
    model = TernaryDecoder(tiny_recipe(tmp_path).spec())
    report = quantize_model(model, weight_bits="4")
    assert len(report.replaced) == 14
    assert model.model.layers[0].mlp.up_proj.weight_bits == "4"


def test_a_tied_head_is_left_by_whatever_name():
    model = nn.Module()
    model.embedding, model.project = nn.Embedding(10, 8), nn.Linear(8, 8)
    model.out = nn.Linear(8, 10, bias=False)
    model.out.weight = model.embedding.weight
    report = quantize_model(model, skip=())
    assert report.replaced == ("project",)
    assert report.skipped == {"out": "tied to embedding"}
    assert "left as it is: out (tied to embedding)" in str(report)


def test_two_layers_that_share_a_weight_round_it_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    report = quantize_model(model)
    assert report.quantized_parameters == 36
    levels, scale = quantize_weights(model[0].weight.detach())
    dequantize_model(model)
    assert torch.equal(model[1].weight.detach(), levels * scale)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("down_proj",), {"down_proj"}),
        (("mlp",), {"gate_proj", "up_proj", "down_proj"}),
        (("self_attn.[qk]_proj",), {"q_proj", "k_proj"}),
        (("model.layers.0",), {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}),
        (("proj",), None),
    ],
)
def test_names_are_matched_by_whole_parts(skip, left):
    model = make("llama")
    if left is None:
        with pytest.raises(ConfigError, match="skip names 'proj', but LlamaForCausalLM has no"):
            quantize_model(model, skip=skip)
        assert not any(isinstance(module, BitLinear) for module in model.modules())
        return
    report = quantize_model(model, skip=(*skip, "lm_head"))
    found = {name.split(".")[-1] for name in report.skipped}
    assert found == {*left, "lm_head"}


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_with_a_forward_of_their_own_are_left():
    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))
    assert quantize_model(model).skipped == {"0": "a Scaled, not torch.nn.Linear itself"}


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigError, match="Sequential has no linear layer to quantise") as caught:
        quantize_model(nn.Sequential(Scaled(4, 4)))
    assert "a Scaled" in caught.value.hint


def test_skip_is_a_list():
    with pytest.raises(ConfigError, match="skip must be a list of names, got the text 'lm_head'"):
        quantize_model(make("llama"), skip="lm_head")


def test_strength_leads_from_the_dense_model_to_the_quantised_one():
    model, other = make("llama"), make("llama")
    ids = torch.arange(20)[None]
    dense = model(ids).logits
    quantize_model(model, strength=0.0)
    assert torch.equal(model(ids).logits, dense)
    set_strength(model, 1.0)
    quantize_model(other)
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert not torch.allclose(model(ids).logits, dense)


def test_it_can_be_undone():
    model = make("qwen2")
    ids = torch.arange(20)[None]
    dense = model(ids).logits
    quantize_model(model, strength=1.0)
    assert len(dequantize_model(model, keep_masters=True)) == 14
    assert torch.equal(model(ids).logits, dense)
    assert not any(isinstance(module, BitLinear) for module in model.modules())
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_dequantised_weights_are_what_the_layers_multiplied_with():
    model = make("llama")
    quantize_model(model, activation_bits=None)
    ids = torch.arange(20)[None]
    quantised = model(ids).logits
    dequantize_model(model)
    torch.testing.assert_close(model(ids).logits, quantised, rtol=1e-4, atol=1e-5)
    weights = model.model.layers[0].mlp.up_proj.weight
    assert len(weights.detach().abs().unique()) == 2


def test_a_layer_with_a_norm_cannot_become_an_ordinary_one():
    model = nn.Sequential(nn.Linear(4, 4))
    quantize_model(model, norm_eps=1e-5)
    with pytest.raises(ConfigError, match="0 has an input norm"):
        dequantize_model(model)


def test_an_optimizer_made_before_goes_on():
    model = make("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    quantize_model(model)
    ids = torch.arange(32)[None]
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2


def test_without_pytorch_the_way_to_it_is_told(monkeypatch):
    monkeypatch.delitem(vars(bitllm.train), "BitLinear", raising=False)
    monkeypatch.delitem(sys.modules, "bitllm.train.bitlinear")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailableError, match="BitLinear needs PyTorch") as e:
        _ = bitllm.train.BitLinear
    assert "bitllm[train]" in e.value.hint


SCRIPT = Path(__file__).parents[1] / "recipes" / "transformers_trainer.py"


def write_words(folder):
    """A tiny Llama with a tokenizer of 60 words, and a text that can be learned."""
    words = {f"w{index}": index for index in range(60)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    make("llama").save_pretrained(folder / "model")
    text = " ".join(f"w{index % 13}" for index in range(4000))
    (folder / "text.txt").write_text(text)


def test_the_trainer_of_transformers_needs_one_call(tmp_path, capsys):
    """The script as it stands; what it writes holds the codes that were trained."""
    write_words(tmp_path)
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = [str(tmp_path / name) for name in ("model", "text.txt", "out")]
    options = ["--steps", "25", "--warmup", "10", "--length", "32", "--learning-rate", "1e-2"]
    main([*arguments, *options])
    printed = capsys.readouterr().out
    assert "14 linear layers quantised" in printed
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "out")
    masters = checkpoint_masters(tmp_path / "out")
    weight = masters["model.layers.1.mlp.up_proj.weight"]
    start = trained.get_parameter("model.layers.1.mlp.up_proj.weight")
    assert not torch.allclose(weight, start)
    codes = checkpoint.ternary("layers.1.up").codes()
    assert (codes == quantize_weights(weight)[0].numpy().astype(np.int8)).all()
    losses = [
        float(line.split("'loss': ")[1].split(",")[0].strip("'"))
        for line in printed.splitlines()
        if "'loss'" in line
    ]
    assert losses[-1] < losses[0] - 1


def checkpoint_masters(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
