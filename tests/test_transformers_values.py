"""Against transformers: models of dense classes whose weights are ternary values.

So are published TriLM (several scales in a matrix), the unpacked Bonsai (a scale for each group of
a row) and the dequantised revisions of Falcon-E (one scale). transformers runs them as dense models
in float32, without rounding activations, so that logits differ by the order of sums alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from batches import logits_of
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.checkpoint import LINEAR_NAMES, Checkpoint
from bitllm.errors import NotTernaryError
from bitllm.formats import open_checkpoint

VOCAB, SHARDS = 131, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Case:
    """An architecture, what shares a scale in its matrices, and keys added to config.json."""

    architecture: str
    sharing: str
    config: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    file: str = "model.safetensors"


TRILM = {"pretraining_model_parallel": SHARDS, "dims_per_head": 16, "rotary_pct": 1.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "falcon-e bfloat16": Case("Llama", "matrix", dtype=torch.bfloat16),
    "trilm": Case("Llama", "shards", published=TRILM, dtype=torch.float16),
    "trilm of one shard": Case("Llama", "matrix", published={"pretraining_model_parallel": 1}),
    "rows": Case("Llama", "row"),
    "bonsai unpacked": Case("Qwen3", "group", {"head_dim": 32}, dtype=torch.float16),
    "bonsai unpacked, yarn": Case("Qwen3", "group", {"head_dim": 32, "rope_parameters": YARN}),
    "gemma": Case("Gemma3", "group", {"head_dim": 32, "sliding_window": 8}),
    "qwen2 with biases": Case("Qwen2", "matrix"),
    "pytorch_model.bin": Case(
        "Llama", "shards", published=TRILM, dtype=torch.bfloat16, file="pytorch_model.bin"
    ),
}
SCALE_SHAPES = {"matrix": 0, "row": 1, "group": 2}


@dataclass(frozen=True)
class Written:
    """A model of transformers in float32 and the checkpoint read from its files."""

    case: Case
    model: Any
    checkpoint: Checkpoint


def group_of(case: Case, name: str, rows: int, columns: int) -> tuple[int, int]:
    """How many rows and columns share a scale."""
    if case.sharing == "shards":
        by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        return (rows, columns // SHARDS) if by_columns else (rows // SHARDS, columns)
    return {"matrix": (rows, columns), "row": (1, columns), "group": (1, 32)}[case.sharing]


def ternary(case: Case, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """Random ternary values in the dtype of the case."""
    rows, columns = group_of(case, name, *shape)
    scales = 0.5 + torch.rand(shape[0] // rows, shape[1] // columns)
    scales = (scales * shape[1] ** -0.5).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (torch.randint(-1, 2, shape) * scales).to(case.dtype)


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    case = CASES[request.param]
    torch.manual_seed(3)
    torch.set_num_threads(1)
    text = "Text" if case.architecture == "Gemma3" else ""
    config = getattr(transformers, f"{case.architecture}{text}Config")(**{**SIZES, **case.config})
    model = getattr(transformers, f"{case.architecture}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                values = ternary(case, name, tuple(parameter.shape))
            elif "norm" in name:
                values = torch.empty(parameter.shape).uniform_(0.5, 1.5)
            else:
                values = torch.empty(parameter.shape).normal_(std=0.2)
            parameter.copy_(values.to(case.dtype))
    directory = tmp_path_factory.mktemp("model")
    state = {name: value.to(case.dtype) for name, value in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=dict(state))
    if case.file == "pytorch_model.bin":
        (directory / "model.safetensors").unlink()
        torch.save(state, directory / case.file)
    fields = json.loads((directory / "config.json").read_text()) | case.published
    (directory / "config.json").write_text(json.dumps(fields))
    return Written(case, model.eval(), open_checkpoint(directory))


def test_weights_are_equal_and_scales_as_few_as_can_be(written: Written) -> None:
    names = {name: f"self_attn.{name}_proj" for name in "qkvo"}
    names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    for index, layer in enumerate(written.model.model.layers):
        for name in LINEAR_NAMES:
            matrix = written.checkpoint.ternary(f"layers.{index}.{name}")
            theirs = layer.get_submodule(names[name]).weight.detach().numpy()
            ours = dequantized(matrix)
            assert np.array_equal(ours, theirs), name
            sharing = written.case.sharing
            if sharing == "shards":
                sharing = "group" if name in ("o", "down") else "row"
            assert matrix.scales.ndim == SCALE_SHAPES[sharing], name


def dequantized(matrix: Any) -> np.ndarray:
    """Codes times scales, float32 [out, in]."""
    scales = matrix.scales
    if scales.ndim == 1:
        scales = scales[:, None]
    elif scales.ndim == 2:
        scales = np.repeat(scales, matrix.group_size, axis=1)[:, : matrix.in_features]
    return matrix.codes() * scales


def test_activations_are_not_quantised(written: Written) -> None:
    assert {linear.activation_bits for _, linear in written.checkpoint.spec.linear_names()} == {
        None
    }


def test_rope_frequencies(written: Written) -> None:
    tables = dict(written.model.model.rotary_emb.named_buffers())
    for layer in written.checkpoint.spec.layers:
        kind = "sliding" if layer.sliding_window else "full"
        theirs = tables.get("inv_freq", tables.get(f"{kind}_attention_inv_freq"))
        assert np.allclose(layer.rope.inverse_frequencies(), theirs.numpy(), rtol=5e-7, atol=0)


@pytest.mark.parametrize(
    "yarn",
    [
        {"original_max_position_embeddings": 32_768, "factor": 2.0},
        {"original_max_position_embeddings": 4096, "beta_fast": 8.0, "beta_slow": 2.0},
        {"original_max_position_embeddings": 4096, "attention_factor": 1.5},
        {"original_max_position_embeddings": 4},
        {"rope_theta": 1.5},
    ],
)
def test_yarn(tmp_path: Path, yarn: dict[str, Any]) -> None:
    """Frequencies and score factor of transformers, for contexts of a usual size."""
    sizes = SIZES | {"head_dim": 128, "max_position_embeddings": 65_536}
    config = transformers.Qwen3Config(**sizes, rope_parameters=YARN | yarn)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(ternary(CASES["rows"], name, tuple(parameter.shape)))
    model.save_pretrained(tmp_path)
    layer = open_checkpoint(tmp_path).spec.layers[0]
    rotary = model.model.rotary_emb
    theirs = rotary.inv_freq.numpy()
    assert np.allclose(layer.rope.inverse_frequencies(), theirs, rtol=1e-6, atol=0)
    assert layer.query_scale == pytest.approx(rotary.attention_scaling**2 / 128**0.5)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_logits(written: Written, device: str) -> None:
    ids = torch.randint(0, VOCAB, (1, 34), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = written.model(ids).logits[0].double().numpy()
    options = LoadOptions(kv_tokens=64, kv_dtype="fp32")
    decoder = get_backend(device).load(written.checkpoint, options)
    ours = logits_of(decoder, ids[0].tolist())
    assert ((ours - theirs) ** 2).sum() / (theirs**2).sum() < 1e-11


def test_a_dequantised_bitnet_says_that_its_activations_have_8_bits(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.LlamaForCausalLM(config)
    case = CASES["falcon-e bfloat16"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(ternary(case, name, tuple(parameter.shape)))
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert open_checkpoint(tmp_path).spec.layers[0].q.activation_bits is None
    (tmp_path / "config.json").write_text(json.dumps(fields | {"is_bitnet_config": True}))
    assert open_checkpoint(tmp_path).spec.layers[0].q.activation_bits == 8


def test_a_dense_model_is_no_ternary_one(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(NotTernaryError, match="this is not a ternary network") as caught:
        open_checkpoint(tmp_path)
    assert "bitllm quantize" in str(caught.value.hint)


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 12_000.0},
        {"sliding_window_pattern": 2, "sliding_window": 8},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 16},
        {"sliding_window_pattern": 4, "query_pre_attn_scalar": 100},
    ],
)
def test_gemma_configurations_of_older_versions(tmp_path: Path, old: dict[str, Any]) -> None:
    """What transformers 5 makes of the keys that versions before it wrote."""
    sizes = SIZES | {"num_hidden_layers": 7, "head_dim": 32}
    theirs = transformers.Gemma3TextConfig(**sizes, **old)
    model = transformers.Gemma3ForCausalLM(theirs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(ternary(CASES["rows"], name, tuple(parameter.shape)))
    model.save_pretrained(tmp_path)
    fields = {**sizes, **old, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    spec = open_checkpoint(tmp_path).spec
    tables = dict(model.model.rotary_emb.named_buffers())
    assert len(spec.layers) == len(theirs.layer_types) == 7
    for layer, kind in zip(spec.layers, theirs.layer_types, strict=True):
        window = theirs.sliding_window if kind == "sliding_attention" else None
        assert layer.sliding_window == (window if window and window < 64 else None)
        assert layer.query_scale == pytest.approx(theirs.query_pre_attn_scalar**-0.5)
        frequencies = tables[f"{kind}_inv_freq"].numpy()
        assert np.allclose(layer.rope.inverse_frequencies(), frequencies, rtol=5e-7, atol=0)
