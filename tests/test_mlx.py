"""MLX directories: the numbers that MLX itself dequantises, and one refusal per thing that lies."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from batches import logits_of
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.backends.sizes import ternary_bytes
from bitllm.checkpoint import LINEAR_NAMES, Checkpoint, TernaryMatrix
from bitllm.config import EngineOptions
from bitllm.engine.memory_plan import plan_memory
from bitllm.errors import (
    CheckpointError,
    FormatError,
    MissingTensorError,
    NotTernaryError,
    TensorShapeError,
    UnsupportedModelError,
)
from bitllm.formats import open_checkpoint
from bitllm.formats.mlx import AffineTensors
from bitllm.ternary import pack
from synthetic import MemorySource, dense_tensor

HIDDEN, FFN, VOCAB, GROUP = 64, 128, 40, 32
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
NAMES = dict(zip(LINEAR_NAMES, SHAPES, strict=True))
GATE = "model.layers.0.mlp.gate_proj"
EMBED = "model.embed_tokens"


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """MLX's packing, written out: 32 / bits neighbours of a row in a word, the first lowest."""
    per_word = 32 // bits
    grouped = codes.astype(np.uint32).reshape(len(codes), -1, per_word)
    places = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    return np.bitwise_or.reduce(grouped << places, axis=2)


class Model:
    """An MLX directory to be written, with everything open to change."""

    def __init__(self, *, granularity: str = "group", dtype: type = np.float16) -> None:
        self.rng = np.random.default_rng(11)
        self.dtype = dtype
        self.config: dict[str, Any] = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": VOCAB,
            "tie_word_embeddings": True,
            "quantization": {"group_size": GROUP, "bits": 2, "mode": "affine"},
        }
        # mlx-lm writes the section twice, under the name that transformers looks for too.
        self.config["quantization_config"] = self.config["quantization"]
        self.tensors: dict[str, np.ndarray] = {}
        self.codes: dict[str, np.ndarray] = {}
        layer = "model.layers.0."
        for norm, size in (
            (f"{layer}input_layernorm", HIDDEN),
            (f"{layer}post_attention_layernorm", HIDDEN),
            (f"{layer}self_attn.q_norm", 16),
            (f"{layer}self_attn.k_norm", 16),
            ("model.norm", HIDDEN),
        ):
            self.tensors[f"{norm}.weight"] = self.rng.uniform(0.5, 1.5, size).astype(dtype)
        for module, shape in {
            **{layer + m: s for m, s in SHAPES.items()},
            EMBED: (VOCAB, HIDDEN),
        }.items():
            self.quantized(module, shape, granularity)

    def quantized(self, module: str, shape: tuple[int, int], granularity: str) -> None:
        self.codes[module] = self.rng.integers(-1, 2, shape).astype(np.int8)
        groups = {"matrix": (1, 1), "row": (shape[0], 1), "group": (shape[0], shape[1] // GROUP)}
        scales = self.rng.uniform(0.1, 0.9, groups[granularity]).astype(self.dtype)
        scales = np.broadcast_to(scales, (shape[0], shape[1] // GROUP)).copy()
        self.tensors[f"{module}.weight"] = words(self.codes[module] + 1, 2)
        self.tensors[f"{module}.scales"] = scales
        self.tensors[f"{module}.biases"] = -scales

    def open(self, directory: Path) -> Checkpoint:
        (directory / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, directory / "model.safetensors", {"format": "mlx"})
        return open_checkpoint(directory)

    def dequantized(self, module: str, bits: int = 2) -> np.ndarray:
        """What MLX makes of the three tensors, as float32."""
        parts = (mx.array(self.tensors[f"{module}.{p}"]) for p in ("weight", "scales", "biases"))
        return np.array(mx.dequantize(*parts, group_size=GROUP, bits=bits).astype(mx.float32))


def dequantized(matrix: Any) -> np.ndarray:
    """Codes times scales, float32 [out, in]."""
    scales = matrix.scales
    if scales.ndim == 1:
        scales = scales[:, None]
    elif scales.ndim == 2:
        scales = np.repeat(scales, matrix.group_size, axis=1)
    return matrix.codes() * scales


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("granularity", "dimensions"), [("matrix", 0), ("row", 1), ("group", 2)])
def test_mlx_dequantises_to_the_same_numbers(
    tmp_path: Path, dtype: type, granularity: str, dimensions: int
) -> None:
    model = Model(granularity=granularity, dtype=dtype)
    checkpoint = model.open(tmp_path)
    for name, module in NAMES.items():
        matrix = checkpoint.ternary(f"layers.0.{name}")
        assert (matrix.codes() == model.codes[f"model.layers.0.{module}"]).all()
        assert matrix.scales.ndim == dimensions
        assert np.array_equal(dequantized(matrix), model.dequantized(f"model.layers.0.{module}"))
    embed = checkpoint.dense("embed")
    assert embed.dtype == ("f16" if dtype is np.float16 else "f32")
    assert np.array_equal(embed.to_float32(), model.dequantized(EMBED))


def test_scales_in_bfloat16(tmp_path: Path) -> None:
    """Written by MLX itself, since NumPy has no bfloat16."""
    model = Model(dtype=np.float32)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    arrays = {name: mx.array(tensor) for name, tensor in model.tensors.items()}
    halves = {
        name: array.astype(mx.bfloat16) if array.dtype == mx.float32 else array
        for name, array in arrays.items()
    }
    mx.save_safetensors(str(tmp_path / "model.safetensors"), halves, {"format": "mlx"})
    checkpoint = open_checkpoint(tmp_path)
    for name, module in {**NAMES, "embed": ""}.items():
        path = f"model.layers.0.{module}" if module else EMBED
        parts = (halves[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
        theirs = np.array(mx.dequantize(*parts, group_size=GROUP, bits=2).astype(mx.float32))
        ours = (
            dequantized(checkpoint.ternary(f"layers.0.{name}"))
            if module
            else checkpoint.dense("embed").to_float32()
        )
        assert np.array_equal(ours, theirs), name
    assert checkpoint.dense("embed").dtype == "bf16"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32))
def test_words_of_mlx_are_the_canonical_packing(rows: int, groups: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, 32 * groups)).astype(np.int8)
    assert (words(codes + 1, 2).astype("<u4").view(np.uint8) == pack(codes)).all()


def test_codes_are_a_view_of_the_file(tmp_path: Path) -> None:
    checkpoint = Model().open(tmp_path)
    assert not checkpoint.ternary("layers.0.q").packed.flags.owndata


def test_an_embedding_is_dequantised_once_for_all_who_hold_it(tmp_path: Path) -> None:
    checkpoint = Model().open(tmp_path)
    embed = checkpoint.dense("embed")
    assert checkpoint.dense("embed").data is embed.data
    kept = weakref.ref(embed.data)
    del embed
    assert kept() is None  # nobody holds it any more
    assert checkpoint.dense("embed").shape == (VOCAB, HIDDEN)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_memory_plan_counts_the_dequantised_embedding_without_making_it(
    tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(dtype=dtype)
    checkpoint = model.open(tmp_path)
    embed = checkpoint.dense("embed")
    assert checkpoint.dense_dtype("embed") == embed.dtype
    assert not checkpoint.is_mapped("embed")
    assert checkpoint.is_mapped("final_norm")
    monkeypatch.setattr(AffineTensors, "dequantize", None)
    for head in ("full", "screened"):
        plan = plan_memory(checkpoint, EngineOptions(device="cpu", head=head, context=32))
        assert plan.weights >= embed.nbytes + ternary_bytes(checkpoint.spec, "2bit")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_embedding_of_other_bits(tmp_path: Path, bits: int) -> None:
    """Rounded by MLX to groups that are not ternary: scale * q + bias, in float32."""
    model = Model(dtype=np.float32)
    values = mx.array(model.rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32))
    parts = mx.quantize(values, group_size=GROUP, bits=bits)
    for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
        model.tensors[f"{EMBED}.{part}"] = np.array(array)
    model.config["quantization"][EMBED] = {"bits": bits, "group_size": GROUP}
    model.config["quantization"]["lm_head"] = False
    embed = model.open(tmp_path).dense("embed")
    assert embed.dtype == "f32"
    theirs = model.dequantized(EMBED, bits)
    assert np.allclose(embed.to_float32(), theirs, rtol=0, atol=1e-6 * abs(theirs).max())


def test_a_dense_embedding(tmp_path: Path) -> None:
    model = Model()
    for part in ("weight", "scales", "biases"):
        del model.tensors[f"{EMBED}.{part}"]
    model.tensors[f"{EMBED}.weight"] = np.ones((VOCAB, HIDDEN), np.float16)
    assert model.open(tmp_path).dense("embed").to_float32().sum() == VOCAB * HIDDEN


def test_what_mx_quantize_makes_of_ternary_weights_is_refused(tmp_path: Path) -> None:
    model = Model(dtype=np.float32)
    values = mx.array(model.codes[GATE].astype(np.float32) * np.float32(0.5))
    for part, array in zip(
        ("weight", "scales", "biases"), mx.quantize(values, group_size=GROUP, bits=2), strict=True
    ):
        model.tensors[f"{GATE}.{part}"] = np.array(array)
    with pytest.raises(CheckpointError, match="gate_proj") as caught:
        model.open(tmp_path).ternary("layers.0.gate")
    assert isinstance(caught.value, NotTernaryError | FormatError)


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({}, None),
        ({"architectures": ["LlamaForCausalLM"], "is_bitnet_config": True}, 8),
        ({"weight_bits": 1, "input_bits": 8}, 8),
        ({"quantization_config": {"quant_method": "bitnet"}}, 8),
    ],
)
def test_activations_are_as_the_configuration_says(
    tmp_path: Path, config: dict[str, Any], bits: int | None
) -> None:
    model = Model()
    model.config |= config
    if "LlamaForCausalLM" in str(config):
        del model.tensors["model.layers.0.self_attn.q_norm.weight"]
        del model.tensors["model.layers.0.self_attn.k_norm.weight"]
    spec = model.open(tmp_path).spec
    assert {linear.activation_bits for _, linear in spec.linear_names()} == {bits}


def _set(name: str, value: np.ndarray) -> Callable[[Model], Any]:
    return lambda model: model.tensors.update({name: value})


def _code_three(model: Model) -> None:
    model.tensors[f"{GATE}.weight"][127, 3] |= np.uint32(3 << 30)


def _bias(model: Model) -> None:
    model.tensors[f"{GATE}.biases"][5, 1] *= np.float16(0.5)


def _scale(value: float) -> Callable[[Model], Any]:
    def change(model: Model) -> None:
        model.tensors[f"{GATE}.scales"][0, 0] = value
        model.tensors[f"{GATE}.biases"][0, 0] = -value

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_code_three, FormatError, "gate_proj.*row 127 holds the code 3"),
        (_bias, NotTernaryError, "gate_proj.*bias is not -scale"),
        (_scale(0.0), FormatError, "gate_proj.*not a positive number"),
        (_scale(-1.0), FormatError, "gate_proj.*not a positive number"),
        (_scale(np.nan), FormatError, "gate_proj.*not a positive number"),
        (_scale(np.inf), FormatError, "gate_proj.*not a positive number"),
        (lambda m: m.tensors.pop(f"{GATE}.biases"), MissingTensorError, "gate_proj.biases"),
        (lambda m: m.tensors.pop(f"{GATE}.scales"), TensorShapeError, "gate_proj.weight"),
        (lambda m: m.tensors.pop(f"{EMBED}.biases"), MissingTensorError, "embed_tokens.biases"),
        (_set(f"{GATE}.weight", np.ones((128, 4), np.int32)), TensorShapeError, "U32"),
        (_set(f"{GATE}.weight", np.ones((128, 5), np.uint32)), TensorShapeError, "U32"),
        (_set(f"{GATE}.scales", np.ones((128, 1), np.float16)), TensorShapeError, "scales"),
        (_set(f"{GATE}.scales", np.ones((128, 2), np.int32)), TensorShapeError, "scales"),
        (_set(f"{GATE}.biases", np.ones((127, 2), np.float16)), TensorShapeError, "biases"),
        (_set("model.layers.0.mlp.router.scales", np.ones(1)), UnsupportedModelError, "router"),
        (lambda m: m.config["quantization"].update(bits=4), TensorShapeError, "4 bits"),
        (lambda m: m.config["quantization"].update(bits=3), UnsupportedModelError, "3 bits"),
        (lambda m: m.config["quantization"].update(group_size=16), UnsupportedModelError, "16"),
        (lambda m: m.config["quantization"].update(mode="mxfp4"), UnsupportedModelError, "mxfp4"),
        (lambda m: m.config["quantization"].update(bits="2"), FormatError, "bits"),
        (lambda m: m.config["quantization"].update({GATE: {"bits": 0}}), FormatError, "bits"),
        (lambda m: m.config.update(intermediate_size=100), TensorShapeError, "gate_proj"),
    ],
)
def test_refusals(
    tmp_path: Path, change: Callable[[Model], Any], error: type[CheckpointError], message: str
) -> None:
    model = Model()
    change(model)
    with pytest.raises(error, match=message) as caught:
        model.open(tmp_path).ternary("layers.0.gate")
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_a_projection_of_four_bits_is_not_ternary(tmp_path: Path) -> None:
    model = Model()
    model.config["quantization"][GATE] = {"bits": 4, "group_size": GROUP}
    model.tensors[f"{GATE}.weight"] = words(model.codes[GATE] + 1, 4)
    with pytest.raises(NotTernaryError, match=r"gate_proj.*4 bits"):
        model.open(tmp_path).ternary("layers.0.gate")


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("granularity", ["matrix", "row", "group"])
def test_a_bitnet_in_mlx_computes_what_it_computed(
    tmp_path: Path, device: str, granularity: str
) -> None:
    """The same codes and scales from memory and from the directory give the same bits."""
    model = Model(granularity=granularity, dtype=np.float32)
    model.config["is_bitnet_config"] = True
    checkpoint = model.open(tmp_path)
    ternary = {}
    for name, module in NAMES.items():
        path = f"model.layers.0.{module}"
        scales = model.tensors[f"{path}.scales"]
        if granularity != "group":
            scales = scales[:, 0] if granularity == "row" else scales[0, 0].reshape(())
        size = GROUP if granularity == "group" else None
        ternary[f"layers.0.{name}"] = TernaryMatrix.from_codes(
            model.codes[path], scales.copy(), size
        )
    dense = {name: checkpoint.dense(name) for name in checkpoint.spec.dense_shapes()}
    dense["embed"] = dense_tensor(model.dequantized(EMBED), "f32")
    in_memory = Checkpoint(checkpoint.spec, MemorySource(dense, ternary), "in memory")
    options = LoadOptions(kv_tokens=64, threads=1)
    ours, expected = (
        logits_of(get_backend(device).load(each, options), list(range(1, 20)))
        for each in (checkpoint, in_memory)
    )
    assert (ours == expected).all()
