"""The mlx and cuda backends beside the reference: exact integers, and logits up to rounding.

Both let a library choose the order of float sums, so logits differ from the reference in the last
bits: mostly by a normalised squared error of about 1e-13. Once such a difference moves an int8 code
to the other side of a tie, everything behind it in that text moves by the noise of quantisation.
So of five texts the median error is held to 1e-4, the largest to 1e-3, and greedy tokens are the
same except where the reference's own two best are closer than four times the row's difference: the
rules of the comparison with transformers (test_transformers_oracle.py).
"""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

import bitllm
from batches import Run, logits_of, make_batch, prompt_ids
from bitllm.backends import get_backend
from bitllm.backends.base import Backend, LoadOptions
from bitllm.backends.cuda import CudaBackend
from bitllm.backends.cuda import linear as cuda_linear
from bitllm.backends.mlx import linear as mlx_linear
from bitllm.backends.mlx.tensors import to_host
from bitllm.checkpoint import TernaryMatrix
from bitllm.errors import (
    BackendUnavailableError,
    ConfigError,
    QuantizationError,
    UnsupportedModelError,
)
from bitllm.ternary import matmul_int32, quantize_activations
from synthetic import (
    SWITCHES,
    random_adapter,
    random_checkpoint,
    random_codes,
    random_uniform,
    tiny_spec,
)

CPU = torch.device("cpu")
BACKENDS: dict[str, Backend] = {"mlx": get_backend("mlx"), "cuda": CudaBackend(CPU, kernels=False)}
SHAPES = [(1, 1), (3, 31), (7, 33), (16, 128), (5, 300), (64, 2560), (33, 6912)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


def accumulators(backend: Backend, matrix: TernaryMatrix, q: np.ndarray) -> np.ndarray:
    """What a backend's product gives for int8 codes, before any scale."""
    x = q.astype(np.float32)
    if backend.name == "mlx":
        return to_host(mlx_linear.PackedMatrix(matrix, "m")(mx.array(x)))
    return cuda_linear.PackedMatrix(matrix, "m", CPU)(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_integer_products_are_exact(backend, shape, tokens):
    codes = random_codes(3, "codes", shape)
    x = random_uniform(4, "x", (tokens, shape[1]))
    q, _ = quantize_activations(x)
    matrix = TernaryMatrix.from_codes(codes, np.float32(0.5).reshape(()))
    found = accumulators(backend, matrix, q)
    assert (found == matmul_int32(codes, q)).all()
    assert found.dtype == np.float32


def test_the_largest_sums_are_exact(backend):
    """Every code 1 and every activation 127: the accumulator that is nearest to 2^24."""
    codes = np.ones((3, 6912), np.int8)
    q = np.full((2, 6912), 127, np.int8)
    matrix = TernaryMatrix.from_codes(codes, np.float32(1).reshape(()))
    assert (accumulators(backend, matrix, q) == 127 * 6912).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 3e4, 1e30])
def test_activations_are_rounded_as_the_reference_does(backend, scale):
    x = random_uniform(5, "x", (4, 300)) * np.float32(scale)
    x[0] = np.arange(300) / 254 * scale  # ties
    x[1] = 0
    q, a = quantize_activations(x)
    if backend.name == "mlx":
        codes, factor = map(to_host, mlx_linear.quantize_activations(mx.array(x)))
    else:
        pair = cuda_linear.quantize_activations(torch.from_numpy(x))
        codes, factor = (part.numpy() for part in pair)
    assert (factor[:, 0] == a).all()
    assert (codes == q).all()


def error_of(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


def assert_agrees(backend: Backend, checkpoint: Any, **options: Any) -> None:
    """Five texts, read in pieces; see the top of this file."""
    wanted_of = get_backend("reference").load(checkpoint, LoadOptions(**options))
    found_of = backend.load(checkpoint, LoadOptions(**options))
    errors, near_ties = [], 0
    for seed in range(5):
        ids = prompt_ids(40, checkpoint.spec.vocab_size, seed)
        wanted, found = logits_of(wanted_of, ids), logits_of(found_of, ids, [33, 38])
        errors.append(error_of(found, wanted))
        for row, other in zip(wanted, found, strict=True):
            second, first = np.sort(row)[-2:]
            if row.argmax() != other.argmax():
                assert first - second < 4 * np.abs(row - other).max()
                near_ties += 1
    assert np.median(errors) < 1e-4, errors
    assert max(errors) < 1e-3, errors
    assert near_ties <= 2


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch(backend, switch):
    assert_agrees(backend, random_checkpoint(tiny_spec(**SWITCHES[switch]), seed=5))


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_every_dtype(backend, dtype, kv_dtype):
    checkpoint = random_checkpoint(tiny_spec(), dtype=dtype, granularity="row")
    assert_agrees(backend, checkpoint, kv_dtype=kv_dtype)


@pytest.mark.parametrize("group_size", [32, 64, 96, 256])
@pytest.mark.parametrize("bits", [8, None])
def test_scales_of_groups(backend, group_size, bits):
    spec = tiny_spec(hidden_size=340, ffn_size=517, bias=True, activation_bits=bits)
    checkpoint = random_checkpoint(spec, granularity="group", group_size=group_size)
    assert_agrees(backend, checkpoint)


def test_runs_of_several_lengths_share_a_step(backend):
    checkpoint = random_checkpoint(tiny_spec(sliding_window=40))
    texts = [prompt_ids(count, 101, seed) for seed, count in enumerate([33, 1, 40, 1, 33])]
    blocks = [[0, 1], [2], [9, 4], [5], [7, 6]]
    runs = [Run(ids, 0, table) for ids, table in zip(texts, blocks, strict=True)]
    options = LoadOptions(kv_tokens=512)
    wanted = get_backend("reference").load(checkpoint, options).forward(make_batch(runs)).logits
    found = backend.load(checkpoint, options).forward(make_batch(runs)).logits
    assert error_of(found, wanted) < 1e-3


def test_runs_with_adapters_and_without_share_a_step():
    """Rows of each run have added what its own adapter says, as in the reference."""
    checkpoint = random_checkpoint(tiny_spec(linear_norm_eps=1e-6, bias=True))
    outputs = []
    for name in ("reference", "mlx"):
        decoder = get_backend(name).load(checkpoint, LoadOptions(kv_tokens=256))
        adapters = [random_adapter(decoder.spec, seed, rank=seed + 2) for seed in range(2)]
        one, two = map(decoder.load_adapter, adapters)
        runs = [
            Run(prompt_ids(count, 101, count), 0, [block], slot)
            for block, (count, slot) in enumerate([(20, one), (7, -1), (20, two), (1, one)])
        ]
        outputs.append(decoder.forward(make_batch(runs)).logits)
    wanted, found = outputs
    for start, stop in pairwise([0, 20, 27, 47, 48]):
        assert error_of(found[start:stop], wanted[start:stop]) < 1e-3


@pytest.mark.parametrize("device", ["mlx"])
def test_the_demo_model_writes_the_same(device):
    prompts = ["The list", "def", "A string is"]
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 0.0}
    with bitllm.load(device="cpu") as one, bitllm.load(device=device) as other:
        for prompt in prompts:
            wanted, found = one.generate(prompt, **options), other.generate(prompt, **options)
            assert found.token_ids == wanted.token_ids
        drawn = {"max_tokens": 40, "temperature": 0.8, "top_k": 20, "seed": 3}
        assert other.generate("A", **drawn).text == one.generate("A", **drawn).text


def test_the_code_three_is_refused(backend):
    matrix = TernaryMatrix(np.array([[0b11]], np.uint8), 4, np.float32(1).reshape(()))
    with pytest.raises(QuantizationError, match="code 3"):
        accumulators(backend, matrix, np.zeros((1, 4), np.int8))


@pytest.mark.parametrize(
    ("option", "value"), [("isa", "avx2"), ("packing", "base3"), ("head", "screened")]
)
def test_options_of_the_cpu_are_refused(backend, option, value):
    with pytest.raises(ConfigError, match=value):
        backend.load(random_checkpoint(tiny_spec()), LoadOptions(**{option: value}))


def test_matrices_of_a_shape_share_their_scales():
    def matrix(rows, columns):
        codes = random_codes(3, "codes", (rows, columns))
        return mlx_linear.PackedMatrix(TernaryMatrix.from_codes(codes, np.float32(1)), "m")

    one, same, other = matrix(9, 256), matrix(9, 256), matrix(9, 384)
    assert one._scales is same._scales
    assert one._scales.shape != other._scales.shape
    assert one.nbytes == 9 * 256 // 4
    kept = mlx_linear._unit_scales
    assert kept[9, 2].scales is one._scales
    del one, same
    gc.collect()
    assert (9, 2) not in kept
    assert (9, 3) in kept


def test_small_groups_are_refused_where_they_do_not_run():
    checkpoint = random_checkpoint(tiny_spec(), granularity="group", group_size=16)
    with pytest.raises(UnsupportedModelError, match="groups of multiples of 32"):
        BACKENDS["mlx"].load(checkpoint, LoadOptions())


def test_a_machine_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="needs an NVIDIA GPU") as caught:
        get_backend("cuda").load(random_checkpoint(tiny_spec()), LoadOptions())
    assert "device='cpu'" in caught.value.hint


def test_a_gpu_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(BackendUnavailableError, match=r"Tesla T4 has compute capability 7\.5"):
        get_backend("cuda").load(random_checkpoint(tiny_spec()), LoadOptions())
