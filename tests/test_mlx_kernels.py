"""Our Metal kernels, their text compiled for a CPU: each alone, and in a whole model.

What this cannot tell: whether Apple's compiler takes the text, and how fast it runs. On a Mac the
self-test of `choice.py` runs them on the GPU.
"""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest

from batches import logits_of, prompt_ids
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.backends.mlx import decoder as mlx_decoder
from bitllm.backends.mlx import linear as mlx_linear
from bitllm.backends.mlx.kernels import choice, head, product, quantize
from bitllm.backends.mlx.kernels.launch import MetalKernel
from bitllm.ternary import matmul_int32, pack, quantize_activations
from metal_on_cpu import MetalOnCpu
from synthetic import random_checkpoint, random_codes, random_uniform, tiny_spec

KERNELS = (quantize.QUANTIZE, product.VECTOR, product.TILES, head.HEAD)
NO_METAL = "No Metal back-end"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> MetalOnCpu:
    return MetalOnCpu(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, compiled: MetalOnCpu) -> None:
    compiled.runs.clear()
    monkeypatch.setattr(
        MetalKernel, "__call__", lambda self, *given, **named: compiled(self, *given, **named)
    )


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    choice.use_kernels.cache_clear()
    yield
    choice.use_kernels.cache_clear()


def packed(codes: np.ndarray) -> tuple[mx.array, int]:
    rows, columns = codes.shape
    words = -(-columns // 32) * 2
    padded = np.zeros((rows, 16 * words), np.int8)
    padded[:, :columns] = codes
    return mx.array(pack(padded).view("<u4")), words


@pytest.mark.parametrize("columns", [1, 17, 300, 2560])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_activations_are_rounded_as_the_reference_does(columns: int, scale: float) -> None:
    x = random_uniform(5, "x", (3, columns)) * np.float32(scale)
    x[0] = np.arange(columns) / 254 * scale  # ties
    x[1] = 0
    q, a = quantize_activations(x)
    codes, factors = quantize.quantize_packed(mx.array(x), -(-columns // 32) * 2)
    found = np.array(codes).view(np.int8)
    assert (found[:, :columns] == q).all()
    assert (found[:, columns:] == 0).all()
    assert (np.array(factors)[:, 0] == a).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_no_factor(bad: float) -> None:
    x = random_uniform(5, "x", (2, 300))
    x[1, 299] = bad
    _, factors = quantize.quantize_packed(mx.array(x), 20)
    assert np.isnan(np.array(factors)[:, 0]).tolist() == [False, True]


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (65, 300), (130, 2560)], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
def test_products_are_exact(shape: tuple[int, int], tokens: int, compiled: MetalOnCpu) -> None:
    codes = random_codes(3, "codes", shape)
    q, _ = quantize_activations(random_uniform(4, "x", (tokens, shape[1])))
    weights, words = packed(codes)
    padded = np.zeros((tokens, 16 * words), np.int8)
    padded[:, : shape[1]] = q
    found = np.array(product.ternary_product(weights, mx.array(padded.view(np.uint32))))
    assert (found == matmul_int32(codes, q)).all()
    kind = "ternary_vector" if tokens <= product.MATVEC_TOKENS else "ternary_tiles"
    assert compiled.runs == [kind]


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_largest_sums_are_exact(tokens: int) -> None:
    for weight, activation in ((1, 127), (-1, 127), (1, -128)):
        weights, words = packed(np.full((3, 6912), weight, np.int8))
        q = np.full((tokens, 16 * words), activation, np.int8)
        found = np.array(product.ternary_product(weights, mx.array(q.view(np.uint32))))
        assert (found == weight * activation * 6912).all()


def test_the_self_test_finds_nothing(fresh_choice: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.use_kernels()


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("quantize", "activations are rounded differently in 1 x 17 codes times 1"),
        ("ternary_vector", "sums differ in 1 x 17 codes times 1"),
        ("ternary_tiles", "sums differ in 1 x 17 codes times 5"),
        ("head", "of 111 logits differ"),
    ],
)
def test_a_kernel_that_disagrees_is_refused(
    broken: str,
    told: str,
    fresh_choice: None,
    compiled: MetalOnCpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(self: MetalKernel, *given: object, **named: object) -> list[mx.array]:
        results = compiled(self, *given, **named)
        return [each + 1 for each in results] if self.name == broken else results

    monkeypatch.setattr(MetalKernel, "__call__", wrong)
    with pytest.warns(RuntimeWarning, match="Metal kernels are not used.*" + told):
        assert not choice.use_kernels()


def test_a_kernel_that_metal_refuses_is_not_used(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: MetalKernel, *given: object, **named: object) -> list[mx.array]:
        raise RuntimeError("[metal::Device] Unable to build metal library")

    monkeypatch.setattr(MetalKernel, "__call__", refuse)
    with pytest.warns(RuntimeWarning, match="Unable to build metal library"):
        assert not choice.use_kernels()


def test_without_metal_they_are_not_even_tried(compiled: MetalOnCpu) -> None:
    choice.use_kernels.cache_clear()
    assert not choice.use_kernels()
    assert compiled.runs == []


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_mlx_takes_their_description(kernel: MetalKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=NO_METAL):
        kernel(
            [mx.zeros((8, 8), mx.uint32) for _ in kernel.inputs],
            constants={"WORDS": 2, "COLUMNS": 8},
            groups=(1, 1),
            results=[((8, 8), mx.float32) for _ in kernel.outputs],
        )


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_model_on_our_kernels(
    dtype: str, compiled: MetalOnCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(hidden_size=340, ffn_size=517, bias=True, attn_sub_norm=True)
    checkpoint = random_checkpoint(spec, granularity="row", dtype=dtype)
    ids = prompt_ids(40, spec.vocab_size)
    wanted = logits_of(get_backend("mlx").load(checkpoint, LoadOptions()), ids, [33, 38])
    for module in (mlx_decoder, mlx_linear):
        monkeypatch.setattr(module, "use_kernels", lambda: True)
    decoder = get_backend("mlx").load(checkpoint, LoadOptions())
    assert decoder.info.kernel == "metal, bitllm"
    found = logits_of(decoder, ids, [33, 38])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    used = {"quantize", "ternary_vector", "ternary_tiles", *(["head"] if dtype == "bf16" else [])}
    assert set(compiled.runs) == used
