"""The canonical checkpoint: matrices, shapes, and the specifications that refuse nonsense."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bitllm.checkpoint import LINEAR_NAMES, DenseTensor, RopeSpec, TernaryMatrix
from bitllm.errors import ConfigError, MissingTensorError, QuantizationError, TensorShapeError
from synthetic import MemorySource, dense_tensor, random_checkpoint, tiny_spec

CODES = np.array([[1, 0, -1, 1, 1], [0, 0, 1, -1, 0]], np.int8)


# Tensors


def test_a_matrix_packs_and_unpacks_its_codes():
    matrix = TernaryMatrix.from_codes(CODES, np.float32([2, 3]))
    assert matrix.shape == (2, 5)
    assert matrix.out_features == 2
    assert matrix.packed.shape == (2, 2)
    assert (matrix.codes() == CODES).all()
    assert matrix.nbytes == 4 + 8
    assert matrix.group_size is None
    assert matrix.source_convention == "multiply"


def test_a_matrix_keeps_what_the_file_stored():
    stored = DenseTensor(np.array([0.5], np.float32), "f32")
    matrix = TernaryMatrix.from_codes(
        CODES, np.float32(2).reshape(()), source_scales=stored, source_convention="divide"
    )
    assert matrix.source_scales is stored
    assert matrix.source_convention == "divide"


@pytest.mark.parametrize(
    ("scales", "group_size"),
    [
        (np.ones(1, np.float32), None),
        (np.ones(3, np.float32), None),
        (np.ones((2, 2), np.float32), None),
        (np.ones((2, 2), np.float32), 2),
        (np.ones(2, np.float32), 5),
        (np.ones(2, np.float64), None),
    ],
)
def test_scales_of_the_wrong_shape_or_dtype_are_refused(scales, group_size):
    with pytest.raises(ConfigError, match="scales must be float32 of shape"):
        TernaryMatrix.from_codes(CODES, scales, group_size)


def test_groups_may_end_with_a_shorter_one():
    assert TernaryMatrix.from_codes(CODES, np.ones((2, 2), np.float32), 3).group_size == 3


def test_packed_bytes_of_the_wrong_shape_are_refused():
    scale = np.ones((), np.float32)
    with pytest.raises(ConfigError, match="uint8"):
        TernaryMatrix(np.zeros((2, 2), np.int8), 5, scale)
    with pytest.raises(ConfigError, match="3 bytes a row, in_features 5 needs 2"):
        TernaryMatrix(np.zeros((2, 3), np.uint8), 5, scale)


def test_codes_that_are_not_ternary_are_refused():
    with pytest.raises(QuantizationError):
        TernaryMatrix.from_codes(CODES * np.int8(2), np.ones((), np.float32))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_dense_values_widen_exactly(dtype):
    values = np.float32([0.5, -1.75, 2.0**-14, 0.0])
    tensor = dense_tensor(values, dtype)
    assert tensor.dtype == dtype
    assert tensor.shape == (4,)
    assert tensor.nbytes == (16 if dtype == "f32" else 8)
    assert tensor.to_float32().dtype == np.float32
    assert (tensor.to_float32() == values).all()


def test_a_bf16_view_that_is_not_contiguous_widens_too():
    tensor = dense_tensor(np.float32([[1, 2], [3, 4]]), "bf16")
    column = DenseTensor(tensor.data[:, 1], "bf16")
    assert column.to_float32().tolist() == [2, 4]


# Specifications


def test_the_specification_lists_every_tensor():
    spec = tiny_spec(qk_norm=True, bias=True, linear_norm_eps=1e-6, attn_sub_norm=True)
    shapes = spec.dense_shapes()
    assert shapes["embed"] == shapes["head"] == (101, 44)
    assert shapes["layers.1.attn_sub_norm"] == (40,)
    assert shapes["layers.0.k_norm"] == (10,)
    assert shapes["layers.1.k.bias"] == (20,)
    assert shapes["layers.1.down.norm"] == (70,)
    assert "layers.0.ffn_sub_norm" not in shapes
    assert "layers.2.attn_norm" not in shapes
    assert all(spec.dense_shape(name) == shape for name, shape in shapes.items())
    names = [name for name, _ in spec.linear_names()]
    assert names == [f"layers.{n}.{name}" for n in (0, 1) for name in LINEAR_NAMES]


@pytest.mark.parametrize(
    "name", ["head", "layers.2.attn_norm", "layers.x.attn_norm", "layers.0.q.bias", "layers", ""]
)
def test_there_are_no_other_tensors(name):
    assert tiny_spec(tied_head=True).dense_shape(name) is None


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_once(tied):
    spec = tiny_spec(tied_head=tied)
    ternary = 2 * (40 * 44 + 2 * 20 * 44 + 44 * 40 + 3 * 70 * 44)
    dense = (1 if tied else 2) * 101 * 44 + 5 * 44
    assert spec.parameter_count() == ternary + dense


def test_heads_must_share_key_heads_evenly():
    with pytest.raises(ConfigError, match="4 heads cannot share 3 KV heads"):
        tiny_spec(num_kv_heads=3)


def test_rope_cannot_turn_more_than_a_head_has():
    with pytest.raises(ConfigError, match="12 dimensions of a head that has 10"):
        tiny_spec(rope_dim=12)


@pytest.mark.parametrize(("theta", "dim"), [(1e4, 5), (1e4, 0), (0.0, 4), (math.inf, 4)])
def test_rope_needs_an_even_size_and_a_positive_base(theta, dim):
    with pytest.raises(ConfigError):
        RopeSpec(theta, dim)


@pytest.mark.parametrize(
    "values",
    [
        {"theta": math.inf},
        {"theta": math.nan},
        {"theta": 1e200},
        {"theta": 1e-200},
        {"scaling": "linear", "factor": 0.0},
        {"scaling": "linear", "factor": -2.0},
        {"scaling": "linear", "factor": math.nan},
        {"scaling": "linear", "factor": math.inf},
        {"scaling": "linear", "factor": 1e60},
        {"scaling": "linear", "factor": 1e-60},
        {"scaling": "llama3", "factor": 1e-60},
        {"scaling": "llama3", "low_freq_factor": 0.0},
        {"scaling": "llama3", "low_freq_factor": math.nan},
        {"scaling": "llama3", "low_freq_factor": 4.0},
        {"scaling": "llama3", "high_freq_factor": 0.5},
        {"scaling": "llama3", "high_freq_factor": math.inf},
        {"scaling": "llama3", "original_context": 0},
        {"scaling": "llama3", "original_context": 10**400},
    ],
)
def test_rope_that_turns_by_no_number_is_refused(values):
    with pytest.raises(ConfigError, match=r"rope|RoPE"):
        RopeSpec(**{"theta": 10000.0, "dim": 64, **values})


@pytest.mark.parametrize("scaling", ["none", "linear", "llama3"])
@pytest.mark.parametrize("theta", [1e-20, 1.0, 1e30])
def test_accepted_rope_frequencies_are_positive_numbers(scaling, theta):
    found = RopeSpec(theta, 64, scaling, 8.0).inverse_frequencies()
    assert np.isfinite(found).all()
    assert (found > 0).all()


@pytest.mark.parametrize("eps", [-1e-6, math.nan, math.inf, 1e-60, 1e60])
def test_an_epsilon_that_float32_lacks_is_refused(eps):
    spec = tiny_spec()
    layer = spec.layers[0]
    for change in (
        lambda: replace(spec, norm_eps=eps),
        lambda: replace(layer, norm_eps=eps),
        lambda: replace(layer.q, norm_eps=eps),
    ):
        with pytest.raises(ConfigError, match="norm_eps"):
            change()


def test_an_epsilon_may_be_zero_or_absent():
    spec = tiny_spec()
    assert replace(spec, norm_eps=0.0).norm_eps == 0
    assert replace(spec.layers[0].q, norm_eps=None).norm_eps is None


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e60])
def test_scales_of_queries_and_embeddings_are_finite(scale):
    spec = tiny_spec()
    with pytest.raises(ConfigError, match="query_scale"):
        replace(spec.layers[0], query_scale=scale)
    with pytest.raises(ConfigError, match="embedding_scale"):
        replace(spec, embedding_scale=scale)


def test_rope_frequencies():
    plain = RopeSpec(10000.0, 4).inverse_frequencies()
    assert plain.dtype == np.float32
    assert plain.tolist() == [1.0, float(np.float32(1) / np.float32(100))]
    assert (RopeSpec(10000.0, 4, "linear", 4.0).inverse_frequencies() == plain / 4).all()


def test_llama3_rope_keeps_short_waves_and_stretches_long_ones():
    rope = RopeSpec(500000.0, 128, "llama3", 8.0, original_context=8192)
    plain = RopeSpec(500000.0, 128).inverse_frequencies()
    ratio = rope.inverse_frequencies() / plain
    wavelengths = 2 * np.pi / plain
    assert (ratio[wavelengths < 8192 / 4] == 1).all()
    assert (ratio[wavelengths > 8192] == np.float32(1 / 8)).all()
    between = ratio[(wavelengths > 8192 / 4) & (wavelengths < 8192)]
    assert len(between) > 0
    assert (np.diff(between) < 0).all()


# Reading


def test_tensors_are_found_by_name():
    checkpoint = random_checkpoint(tiny_spec())
    assert checkpoint.dense("layers.1.ffn_norm").shape == (44,)
    assert checkpoint.ternary("layers.0.down").shape == (44, 70)


def test_missing_tensors_are_named():
    checkpoint = replace(random_checkpoint(tiny_spec()), source=MemorySource({}, {}))
    with pytest.raises(MissingTensorError, match="synthetic model: tensor 'embed' is missing"):
        checkpoint.dense("embed")
    with pytest.raises(MissingTensorError, match=r"'layers\.0\.q' is missing"):
        checkpoint.ternary("layers.0.q")


def test_shapes_are_those_of_the_architecture():
    source = random_checkpoint(tiny_spec(vocab_size=90, ffn_size=60)).source
    checkpoint = replace(random_checkpoint(tiny_spec()), source=source)
    wrong = r"'embed' has shape \[90, 44\], but the configuration asks for \[101, 44\]"
    with pytest.raises(TensorShapeError, match=wrong):
        checkpoint.dense("embed")
    with pytest.raises(TensorShapeError, match=r"'layers\.1\.up' has shape \[60, 44\]"):
        checkpoint.ternary("layers.1.up")
