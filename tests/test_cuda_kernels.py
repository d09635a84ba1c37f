"""The Triton kernels under their interpreter, beside the reference and beside plain PyTorch.

Integers are equal. Floats differ by the order of sums; bfloat16 caches are left to the GPU, since
the interpreter cuts where the hardware rounds. What the compiler makes of the kernels is looked at
in test_cuda_compiled.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from batches import Run, logits_of, make_batch, prompt_ids
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.backends.cuda import CudaBackend
from bitllm.backends.cuda.attention import Angles, KvCache, StepLayout, lay_out, rotate
from bitllm.backends.cuda.attention import attend as plain_attend
from bitllm.backends.cuda.fused_layer import can_fuse
from bitllm.backends.cuda.kernels.attention import attend
from bitllm.backends.cuda.kernels.head import logits_of as head_logits
from bitllm.backends.cuda.kernels.product import (
    gated_product,
    grouped_product,
    pack_rows,
    ternary_product,
)
from bitllm.backends.cuda.kernels.quantize import norm_quantize
from bitllm.backends.cuda.kernels.rope import rotate_and_store
from bitllm.backends.cuda.layer import gated
from bitllm.backends.cuda.linear import rms_norm
from bitllm.checkpoint import LayerSpec
from bitllm.errors import QuantizationError
from bitllm.ternary import matmul_int32, pack, quantize_activations
from synthetic import SWITCHES, random_checkpoint, random_codes, random_uniform, tiny_spec

# NumPy warns under the interpreter where a GPU just gives infinity or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
INTERPRETED = CudaBackend(CPU, kernels=True)
SHAPES = [(1, 1), (5, 3), (33, 255), (16, 256), (70, 517), (20, 2560), (20, 6912)]


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values))


# Rounding


@pytest.mark.parametrize("columns", [1, 31, 256, 300, 2560])
def test_rounding_is_that_of_the_reference(columns):
    x = random_uniform(1, "x", (5, columns))
    x[0] = np.arange(columns) % 255 / 254  # ties
    x[1] = 0
    x[2] *= np.float32(1e30)
    q, a = quantize_activations(x)
    found = norm_quantize(tensor(x))
    assert (found.codes.numpy()[:, :columns] == q).all()
    assert (found.codes.numpy()[:, columns:] == 0).all()
    assert (found.factors.numpy() == a).all()
    assert (found.sums.numpy() == q.sum(axis=1, dtype=np.int32)).all()


def test_rounding_after_a_norm():
    x, gain = random_uniform(1, "x", (4, 300)), random_uniform(2, "gain", (300,))
    normed = rms_norm(tensor(x), tensor(gain), 1e-5).numpy()
    q, a = quantize_activations(normed)
    found = norm_quantize(tensor(x), tensor(gain), 1e-5)
    assert np.abs(found.codes.numpy()[:, :300].astype(int) - q).max() <= 1  # of ties
    assert (found.codes.numpy()[:, :300] != q).mean() < 0.01
    np.testing.assert_allclose(found.factors.numpy(), a, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_no_number_gets_no_factor(value):
    x = random_uniform(1, "x", (3, 40))
    x[1, 7] = value
    assert np.isnan(norm_quantize(tensor(x)).factors.numpy()).tolist() == [False, True, False]


# Products


@pytest.mark.parametrize("columns", [1, 4, 255, 256, 257, 2560])
def test_the_packing_of_the_device_holds_the_same_codes(columns):
    codes = random_codes(1, "codes", (3, columns))
    packed = pack_rows(pack(codes), columns)
    for column in range(columns):
        block, inside = divmod(column, 256)
        byte = packed[:, block * 64 + inside % 64]
        assert ((byte >> (2 * (inside // 64)) & 3).astype(int) - 1 == codes[:, column]).all()
    assert packed.shape == (3, -(-columns // 256) * 64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 70])
def test_products_are_exact(shape, tokens):
    codes = random_codes(3, "codes", shape)
    x, bias = random_uniform(4, "x", (tokens, shape[1])), random_uniform(5, "bias", shape[:1])
    scales = np.abs(random_uniform(6, "scales", shape[:1])) + np.float32(0.1)
    q, a = quantize_activations(x)
    wanted = (matmul_int32(codes, q).astype(np.float32) / a[:, None]) * scales
    weights = tensor(pack_rows(pack(codes), shape[1]))
    found = ternary_product(norm_quantize(tensor(x)), weights, tensor(scales))
    assert (found.numpy() == wanted).all()
    found = ternary_product(norm_quantize(tensor(x)), weights, tensor(scales), tensor(bias))
    assert (found.numpy() == wanted + bias).all()


@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((33, 64), 64), ((20, 300), 64), ((37, 700), 128), ((5, 520), 256), ((5, 70), 192)],
)
@pytest.mark.parametrize("tokens", [1, 70])
def test_products_with_scales_of_groups_are_the_reference_to_the_bit(shape, group_size, tokens):
    codes, x = random_codes(3, "codes", shape), random_uniform(4, "x", (tokens, shape[1]))
    groups, bias = -(-shape[1] // group_size), random_uniform(5, "bias", shape[:1])
    scales = random_uniform(6, "scales", (shape[0], groups))
    q, a = quantize_activations(x)
    wanted = np.zeros((tokens, shape[0]), np.float32)
    for group in range(groups):
        columns = slice(group * group_size, (group + 1) * group_size)
        sums = matmul_int32(codes[:, columns], q[:, columns]).astype(np.float32)
        wanted += (sums / a[:, None]) * scales[:, group]
    rounded, weights = norm_quantize(tensor(x)), tensor(pack_rows(pack(codes), shape[1]))
    operands = rounded, weights, tensor(scales), shape[1], group_size
    assert (grouped_product(*operands).numpy() == wanted).all()
    assert (grouped_product(*operands, tensor(bias)).numpy() == wanted + bias).all()


@pytest.mark.parametrize("activation", ["relu2", "silu", "gelu_tanh"])
@pytest.mark.parametrize("biased", [False, True])
def test_gate_and_up_in_one_product(activation, biased):
    shape, x = (70, 300), random_uniform(4, "x", (18, 300))
    codes = random_codes(3, "codes", (140, 300))
    scales = tensor(np.abs(random_uniform(6, "scales", (140,))))
    bias = tensor(random_uniform(5, "bias", (140,))) if biased else None
    weights = tensor(pack_rows(pack(codes), 300))
    rounded = norm_quantize(tensor(x))
    both = ternary_product(rounded, weights, scales, bias)
    wanted = gated(activation, both[:, : shape[0]], both[:, shape[0] :])
    found = gated_product(rounded, weights, scales, bias, activation)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


# Attention


def mixed_step(spec: LayerSpec) -> tuple[StepLayout, Angles, torch.Tensor]:
    """Three runs of different lengths: their layout, and random products of q, k and v."""
    runs = [Run(prompt_ids(35, 101), 0, [1, 5]), Run([4], 0, [3]), Run([5] * 2, 31, [4, 0])]
    batch = make_batch(runs)
    layout = lay_out(batch, {spec.sliding_window}, CPU)
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    qkv = tensor(random_uniform(8, "qkv", (len(batch.token_ids), width)))
    return layout, Angles.of(batch.positions, spec.rope, CPU), qkv


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"qk_norm": True},
    "window": {"sliding_window": 7},
    "partial rope": {"rope_dim": 6},
    "one kv head": {"head_dim": 34, "num_kv_heads": 1},
}


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("case", ATTENTION)
def test_rope_storing_and_attention(case, kv_dtype):
    spec = tiny_spec(**ATTENTION[case]).layers[0]
    layout, angles, qkv = mixed_step(spec)
    heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.head_dim
    plain, found = (KvCache(8, spec, kv_dtype, CPU) for _ in range(2))
    gains = tuple(tensor(random_uniform(seed, "gain", (width,))) for seed in (1, 2))

    sizes = [heads * width, kv_heads * width, kv_heads * width]
    q, k, v = (part.reshape(len(qkv), -1, width) for part in qkv.split(sizes, dim=1))
    if spec.qk_norm:
        q, k = rms_norm(q, gains[0], 1e-5), rms_norm(k, gains[1], 1e-5)
    q = rotate(q, angles)
    plain.write(layout.slots, rotate(k, angles), v)
    queries = rotate_and_store(
        qkv,
        (angles.cosine, angles.sine),
        gains if spec.qk_norm else None,  # type: ignore[arg-type]
        1e-5,
        found.tensors,
        layout.slots,
        heads,
    )
    torch.testing.assert_close(queries, q, rtol=1e-5, atol=2e-6)
    if kv_dtype == "int8":
        assert (plain.tensors[0].int() - found.tensors[0].int()).abs().max() <= 1
        assert (plain.tensors[1] == found.tensors[1]).all()
    else:
        torch.testing.assert_close(found.tensors, plain.tensors, rtol=1e-5, atol=2e-6)

    wanted = plain_attend(queries, layout, found, spec)
    arguments = (layout.tables, layout.runs, layout.positions, spec.query_scale)
    attended = attend(queries, found.tensors, *arguments, spec.sliding_window)
    torch.testing.assert_close(attended, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("position", [0, 31, 255, 256, 900])
@pytest.mark.parametrize("window", [None, 300])
def test_a_long_context_is_read_in_parts_and_merged(position, window):
    """One token, so that the context is split; also into parts that no position falls into."""
    spec = tiny_spec(num_kv_heads=2, sliding_window=window).layers[0]
    cache = KvCache(40, spec, "fp32", CPU)
    for seed, part in enumerate(cache.tensors):
        part[:] = tensor(random_uniform(seed, "cache", tuple(part.shape)))
    batch = make_batch([Run([1], position, range(39, 10, -1))])
    layout = lay_out(batch, {window}, CPU)
    query = tensor(random_uniform(5, "query", (1, spec.num_heads, spec.head_dim)))
    wanted = plain_attend(query, layout, cache, spec)
    arguments = (layout.tables, layout.runs, layout.positions, spec.query_scale, window)
    torch.testing.assert_close(attend(query, cache.tensors, *arguments), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 20])
def test_logits(dtype, tokens):
    hidden = tensor(random_uniform(1, "hidden", (tokens, 100)))
    head = tensor(random_uniform(2, "head", (131, 100))).to(dtype)
    wanted = hidden.double() @ head.double().T
    found = head_logits(hidden, head)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


# The decoder


def decoders(checkpoint: Any, **options: Any) -> list[Any]:
    backends = [get_backend("reference"), INTERPRETED]
    return [backend.load(checkpoint, LoadOptions(**options)) for backend in backends]


def assert_agree(checkpoint: Any, **options: Any) -> None:
    reference, interpreted = decoders(checkpoint, **options)
    assert interpreted.info.kernel == "triton"
    ids = prompt_ids(9, checkpoint.spec.vocab_size, 5)
    wanted, found = logits_of(reference, ids), logits_of(interpreted, ids, [7, 8])
    assert ((found - wanted) ** 2).sum() / (wanted**2).sum() < 1e-4


FIRST = ("plain", "linear_norms", "biases")
LATER = [pytest.param(name, marks=pytest.mark.slow) for name in SWITCHES if name not in FIRST]


@pytest.mark.parametrize("switch", [*FIRST, *LATER])
def test_every_switch(switch):
    assert_agree(random_checkpoint(tiny_spec(**SWITCHES[switch]), seed=5), kv_dtype="fp32")


@pytest.mark.parametrize(
    ("granularity", "group_size", "fused"),
    [("row", None, True), ("group", 64, True), ("group", 32, False)],
)
def test_scales_of_rows_and_of_groups(granularity, group_size, fused):
    spec = tiny_spec(num_layers=1, ffn_size=140)
    checkpoint = random_checkpoint(spec, granularity=granularity, group_size=group_size)
    assert can_fuse(checkpoint, 0) == fused
    assert_agree(checkpoint, kv_dtype="int8")


def test_activations_that_are_no_numbers_are_refused():
    checkpoint = random_checkpoint(tiny_spec(), dtype="f32")
    _, decoder = decoders(checkpoint, kv_dtype="fp32")
    decoder._embed[7, 0] = torch.nan
    with pytest.raises(QuantizationError, match="only finite numbers"):
        decoder.forward(make_batch([Run([3, 7])]))
    fresh = decoders(checkpoint, kv_dtype="fp32")[1]
    ids = [3, 8, 9]
    np.testing.assert_array_equal(logits_of(decoder, ids), logits_of(fresh, ids))
