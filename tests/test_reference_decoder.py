"""The reference decoder against a textbook decoder in float64, and against itself in pieces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batches import Run, logits_of, make_batch, prompt_ids
from bitllm.backends.base import LoadOptions
from bitllm.backends.reference import ReferenceBackend
from bitllm.backends.reference.attention import KvCache
from bitllm.backends.reference.layer import Linear, rms_norm
from bitllm.checkpoint import Checkpoint, TernaryMatrix
from bitllm.errors import (
    ConfigError,
    InsufficientMemoryError,
    QuantizationError,
)
from bitllm.ternary import dequantize, quantize_activations
from synthetic import SWITCHES, MemorySource, random_checkpoint, tiny_spec
from textbook import textbook_logits

FP32 = LoadOptions(kv_dtype="fp32")
SCALES = [("tensor", None), ("row", None), ("group", 9), ("group", 64)]


def load(checkpoint: Checkpoint, options: LoadOptions = FP32):
    return ReferenceBackend().load(checkpoint, options)


def test_the_name_and_the_info_say_what_it_is():
    decoder = load(random_checkpoint(tiny_spec()), LoadOptions(kv_tokens=33))
    assert ReferenceBackend().name == decoder.info.backend == "reference"
    assert decoder.info.threads == 1
    assert decoder.kv_capacity == 2
    assert decoder.info.kv_bytes == 2 * 2 * 2 * 32 * (2 * 10) * 2
    assert decoder.info.weight_bytes > 2 * 101 * 44 * 2


def test_the_context_window_sizes_the_cache():
    assert load(random_checkpoint(tiny_spec(max_context=65))).kv_capacity == 3


# What is computed


@pytest.mark.parametrize("switch", SWITCHES)
def test_logits_are_those_of_the_textbook(switch):
    """Without rounding of activations the function is smooth, so that float32 can come close."""
    spec = tiny_spec(**{**SWITCHES[switch], "activation_bits": None})
    checkpoint = random_checkpoint(spec, seed=3)
    ids = prompt_ids(40, spec.vocab_size)
    exact = textbook_logits(checkpoint, ids)
    spread = exact.std()
    assert np.abs(logits_of(load(checkpoint), ids) - exact).max() < 2e-5 * spread


@pytest.mark.parametrize(("granularity", "group_size"), SCALES)
@pytest.mark.parametrize("bits", [8, None])
def test_scales_of_every_granularity(bits, granularity, group_size):
    spec = tiny_spec(activation_bits=bits, bias=True, linear_norm_eps=1e-6)
    checkpoint = random_checkpoint(spec, granularity=granularity, group_size=group_size)
    name = "layers.1.down"
    linear = Linear(checkpoint, name, spec.layers[1].down)
    x = np.random.default_rng(1).normal(size=(5, 70)).astype(np.float32)
    matrix = checkpoint.ternary(name)
    weights = dequantize(matrix.codes(), matrix.scales, group_size).astype(np.float64)
    inputs = rms_norm(x, checkpoint.dense(f"{name}.norm").to_float32(), 1e-6).astype(np.float64)
    if bits == 8:
        q, a = quantize_activations(inputs)
        inputs = q / a[:, None].astype(np.float64)
    exact = inputs @ weights.T + checkpoint.dense(f"{name}.bias").to_float32()
    np.testing.assert_allclose(linear(x), exact, rtol=1e-5, atol=1e-5)


def test_a_scale_for_the_tensor_a_row_or_a_group_gives_one_result_when_they_are_equal():
    spec = tiny_spec()
    checkpoint = random_checkpoint(spec, granularity="tensor")
    one = checkpoint.ternary("layers.0.up")
    x = np.random.default_rng(2).normal(size=(3, 44)).astype(np.float32)

    def product(matrix):
        source = MemorySource({}, {"layers.0.up": matrix})
        return Linear(replace(checkpoint, source=source), "layers.0.up", spec.layers[0].up)(x)

    by_row = TernaryMatrix.from_codes(one.codes(), np.full(70, one.scales, np.float32))
    by_group = TernaryMatrix.from_codes(one.codes(), np.full((70, 2), one.scales, np.float32), 22)
    assert (product(one) == product(by_row)).all()
    np.testing.assert_allclose(product(one), product(by_group), rtol=1e-5, atol=1e-6)


def test_keys_and_values_are_rounded_before_they_are_read():
    checkpoint = random_checkpoint(tiny_spec(num_layers=1))
    ids = prompt_ids(5, 101)
    batch = make_batch([Run(ids)])
    rounded, exact = load(checkpoint, LoadOptions()), load(checkpoint)
    assert (rounded.forward(batch).logits != exact.forward(batch).logits).any()
    block = np.zeros(1, np.int32)
    stored = rounded.read_blocks(block).view(np.uint16).astype(np.uint32)
    kept = exact.read_blocks(block).view(np.uint32)
    away = (stored << 16).astype(np.int64) - kept
    assert np.abs(away).max() <= 0x8000
    assert np.abs(away).max() > 0


def test_bf16_storage_rounds_half_to_even():
    layer = tiny_spec(num_heads=1, num_kv_heads=1, head_dim=6).layers[0]
    cache = KvCache(1, layer, "bf16")
    ulp = 2.0**-7
    odd = [1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.51 * ulp, -1 - ulp / 2, np.nan, 2.0**100]
    values = np.float32(odd)
    row = values.reshape(1, 1, 6)
    cache.write(np.zeros(1, np.int32), np.array([3], np.int32), row, -row)
    keys, mirrored = cache.read(0, slice(3, 4))
    expected = [1, 1 + 2 * ulp, 1 + ulp, -1, np.nan, 2.0**100]
    np.testing.assert_array_equal(keys.ravel(), np.float32(expected))
    np.testing.assert_array_equal(mirrored, -keys)


def test_hidden_states_beyond_float32_are_told():
    checkpoint = random_checkpoint(tiny_spec(post_norms=True), magnitude=1e15)
    with pytest.raises(QuantizationError, match="activations hold"):
        logits_of(load(checkpoint), [1, 2, 3])


# Invariance


@pytest.mark.parametrize("switch", ["plain", "sliding_window", "wide_window", "float_activations"])
def test_a_prompt_in_pieces_gives_the_same_bits(switch):
    checkpoint = random_checkpoint(tiny_spec(**SWITCHES[switch]))
    ids = prompt_ids(75, 101)
    options = LoadOptions(kv_dtype="bf16")
    whole = logits_of(load(checkpoint, options), ids)
    for cuts in ([1, 2, 3], [32], [31, 33, 64], [74]):
        assert (logits_of(load(checkpoint, options), ids, cuts) == whole).all()


def test_batches_and_block_ids_do_not_change_a_bit():
    checkpoint = random_checkpoint(tiny_spec())
    first, second = prompt_ids(40, 101, seed=1), prompt_ids(9, 101, seed=2)
    alone = [logits_of(load(checkpoint), ids) for ids in (first, second)]
    mixed = load(checkpoint).forward(make_batch([Run(second, 0, [5]), Run(first, 0, [7, 2])]))
    assert (mixed.logits == np.concatenate([alone[1], alone[0]])).all()


# Refusals


def test_a_kernel_set_is_refused():
    with pytest.raises(ConfigError, match="avx2"):
        load(random_checkpoint(tiny_spec()), LoadOptions(isa="avx2"))


def test_too_little_memory_is_told():
    # Two keys and values of 2^42 positions: no machine has them.
    with pytest.raises(InsufficientMemoryError, match="synthetic model does not fit"):
        load(random_checkpoint(tiny_spec()), LoadOptions(kv_tokens=2**50))
