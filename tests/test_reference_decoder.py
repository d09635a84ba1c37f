"""The reference decoder against a textbook decoder in float64, and against itself in pieces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batches import Draw, Run, logits_of, make_batch, make_plan, prompt_ids
from bitllm.backends.base import Batch, LoadOptions, OutputKind
from bitllm.backends.reference import ReferenceBackend
from bitllm.backends.reference.layer import Linear, rms_norm
from bitllm.checkpoint import Checkpoint, TernaryMatrix
from bitllm.errors import (
    ConfigError,
    InsufficientMemoryError,
    MissingTensorError,
    QuantizationError,
    TensorShapeError,
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


# Invariance


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("switch", ["plain", "sliding_window", "wide_window", "float_activations"])
def test_a_prompt_in_pieces_gives_the_same_bits(switch, kv_dtype):
    checkpoint = random_checkpoint(tiny_spec(**SWITCHES[switch]))
    ids = prompt_ids(75, 101)
    options = LoadOptions(kv_dtype=kv_dtype)
    whole = logits_of(load(checkpoint, options), ids)
    for cuts in ([1, 2, 3], [32], [31, 33, 64], [74]):
        assert (logits_of(load(checkpoint, options), ids, cuts) == whole).all()


def test_batches_and_block_ids_do_not_change_a_bit():
    checkpoint = random_checkpoint(tiny_spec())
    first, second = prompt_ids(40, 101, seed=1), prompt_ids(9, 101, seed=2)
    alone = [logits_of(load(checkpoint), ids) for ids in (first, second)]
    mixed = load(checkpoint).forward(make_batch([Run(second, 0, [5]), Run(first, 0, [7, 2])]))
    assert (mixed.logits == np.concatenate([alone[1], alone[0]])).all()


# Outputs


def mixed_outputs(decoder, plan, ids):
    batch = make_batch([Run(ids)], rows=[8, 3, 8, 5, 0, 8])
    kinds = [OutputKind.SCORE, *[OutputKind.SAMPLE] * 2, OutputKind.HIDDEN, OutputKind.SCORE]
    kinds.append(OutputKind.LOGITS)
    return decoder.forward(
        replace(
            batch,
            output_kinds=np.array(kinds, np.uint8),
            score_targets=np.array([50, 60], np.int32),
            score_top_n=np.array([2, 0], np.int32),
            plan=plan,
        )
    )


def test_each_row_gets_what_it_asked_for():
    decoder, ids = load(random_checkpoint(tiny_spec())), prompt_ids(9, 101)
    plan = make_plan([Draw(temperature=0), Draw(seed=4, top_logprobs=3)], 101)
    output = mixed_outputs(decoder, plan, ids)
    logits = logits_of(decoder, ids)
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1))[:, None]

    assert output.hidden.shape == (1, 44)
    assert (output.logits == logits[8:9]).all()
    assert output.sampled[0] == logits[3].argmax()
    # Rows of scores: the two samples, then the two targets.
    assert output.top_ids.shape == output.top_logprobs.shape == (4, 3)
    assert np.isnan(output.logprobs[0])
    wanted = [logprobs[8, output.sampled[1]], logprobs[8, 50], logprobs[0, 60]]
    np.testing.assert_allclose(output.logprobs[1:], wanted, rtol=1e-5, atol=1e-6)
    best = np.argsort(-logits[8], kind="stable")
    assert output.top_ids[0].tolist() == [-1, -1, -1]
    assert output.top_ids[1].tolist() == best[:3].tolist()
    assert output.top_ids[2].tolist() == [*best[:2], -1]
    assert np.isnan(output.top_logprobs[2]).tolist() == [False, False, True]
    assert output.top_ids[3].tolist() == [-1, -1, -1]


def test_the_hidden_state_is_that_after_the_final_norm():
    checkpoint = random_checkpoint(tiny_spec(tied_head=True), dtype="f32")
    batch = make_batch([Run(prompt_ids(4, 101))], OutputKind.HIDDEN)
    decoder = load(checkpoint)
    hidden = decoder.forward(batch).hidden
    logits = logits_of(decoder, prompt_ids(4, 101))
    exact = hidden.astype(np.float64) @ checkpoint.dense("embed").to_float32().T
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


def test_a_step_may_want_nothing_back():
    decoder = load(random_checkpoint(tiny_spec()))
    ids = prompt_ids(6, 101)
    output = decoder.forward(make_batch([Run(ids[:5])], rows=[]))
    assert output.logits.shape == (0, 101)
    assert output.hidden.shape == (0, 44)
    assert output.top_ids.shape == (0, 0)
    rest = decoder.forward(make_batch([Run(ids[5:], 5)])).logits
    assert (rest == logits_of(load(random_checkpoint(tiny_spec())), ids)[5:]).all()


# KV storage


def test_blocks_can_be_copied_read_and_written():
    checkpoint = random_checkpoint(tiny_spec())
    ids = prompt_ids(40, 101)
    decoder, other = load(checkpoint, LoadOptions()), load(checkpoint, LoadOptions())
    whole = decoder.forward(make_batch([Run(ids, 0, [3, 4])])).logits
    decoder.copy_blocks(np.array([[3, 6], [6, 0]], np.int32))
    after_copy = decoder.forward(make_batch([Run(ids[32:], 32, [0, 5])])).logits
    assert (after_copy == whole[32:]).all()

    data = decoder.read_blocks(np.array([4, 3], np.int32))
    assert data.shape == (2, decoder.info.kv_bytes // decoder.kv_capacity)
    other.write_blocks(np.array([1, 7], np.int32), data)
    assert (other.read_blocks(np.array([7, 1], np.int32)) == data[::-1]).all()
    last = other.forward(make_batch([Run(ids[39:], 39, [7, 1])])).logits
    assert (last == whole[39:]).all()


@pytest.mark.parametrize("blocks", [[-1], [8]])
def test_unknown_blocks_are_refused(blocks):
    decoder = load(random_checkpoint(tiny_spec()))
    ids = np.array(blocks, np.int32)
    with pytest.raises(ConfigError, match=r"KV blocks are 0 \.\. 7"):
        decoder.read_blocks(ids)
    with pytest.raises(ConfigError, match=r"KV blocks are 0 \.\. 7"):
        decoder.copy_blocks(np.array([[0, blocks[0]]], np.int32))


@pytest.mark.parametrize("wrong", [np.zeros((1, 7), np.uint8), np.zeros((2, 10240), np.uint8)])
def test_bytes_of_another_size_are_not_written(wrong):
    decoder = load(random_checkpoint(tiny_spec()))
    with pytest.raises(ConfigError, match="1 KV blocks need uint8"):
        decoder.write_blocks(np.zeros(1, np.int32), wrong)


def test_a_closed_decoder_computes_nothing():
    decoder = load(random_checkpoint(tiny_spec()))
    decoder.close()
    with pytest.raises(ConfigError):
        decoder.forward(make_batch([Run([1])]))


# Refusals


def without(checkpoint: Checkpoint, name: str) -> Checkpoint:
    source = checkpoint.source
    dense = {key: value for key, value in source.dense_tensors.items() if key != name}
    ternary = {key: value for key, value in source.ternary_matrices.items() if key != name}
    return replace(checkpoint, source=MemorySource(dense, ternary))


FULL = {"qk_norm": True, "bias": True, "linear_norm_eps": 1e-6, "post_norms": True}


@pytest.mark.parametrize(
    "name",
    [
        "embed",
        "head",
        "final_norm",
        "layers.1.attn_norm",
        "layers.1.post_ffn_norm",
        "layers.0.k_norm",
        "layers.1.gate",
        "layers.0.o.norm",
        "layers.1.down.bias",
    ],
)
def test_a_missing_tensor_is_named(name):
    checkpoint = random_checkpoint(tiny_spec(**FULL))
    with pytest.raises(MissingTensorError, match=f"'{name}' is missing"):
        load(without(checkpoint, name))


def test_a_tensor_of_another_shape_is_named():
    checkpoint = random_checkpoint(tiny_spec())
    other = random_checkpoint(tiny_spec(ffn_size=71))
    with pytest.raises(TensorShapeError, match=r"'layers.0.gate' has shape \[71, 44\]"):
        load(replace(checkpoint, source=other.source))


def test_a_code_that_is_not_ternary_is_refused():
    checkpoint = random_checkpoint(tiny_spec())
    checkpoint.ternary("layers.1.v").packed[7, 3] = 0xFF
    with pytest.raises(QuantizationError, match="row 7 holds the code 3"):
        load(checkpoint)


def test_a_kernel_set_is_refused():
    with pytest.raises(ConfigError, match="avx2"):
        load(random_checkpoint(tiny_spec()), LoadOptions(isa="avx2"))


def test_too_little_memory_is_told():
    # Two keys and values of 2^42 positions: no machine has them.
    with pytest.raises(InsufficientMemoryError, match="synthetic model does not fit"):
        load(random_checkpoint(tiny_spec()), LoadOptions(kv_tokens=2**50))


def batch_with(**fields) -> Batch:
    return replace(make_batch([Run([1, 2, 3])]), **fields)


I32 = np.int32
CONTRADICTIONS = {
    "no tokens": {"token_ids": np.zeros(0, I32)},
    "id too high": {"token_ids": np.array([1, 101, 3], I32)},
    "negative id": {"token_ids": np.array([1, -1, 3], I32)},
    "runs do not cover": {"run_offsets": np.array([0, 2], I32)},
    "empty run": {"run_offsets": np.array([0, 0, 3], I32)},
    "positions jump": {"positions": np.array([0, 2, 3], I32)},
    "negative position": {"positions": np.array([-1, 0, 1], I32)},
    "too few positions": {"positions": np.array([0, 1], I32)},
    "block unused": {"block_tables": np.array([[-1, 0]], I32)},
    "block unknown": {"block_tables": np.array([[8]], I32)},
    "position behind the table": {"positions": np.array([255, 256, 257], I32)},
    "adapter": {"adapter_slots": np.array([0], I32)},
    "row unknown": {"output_rows": np.array([0, 1, 3], I32)},
    "negative row": {"output_rows": np.array([0, 1, -1], I32)},
    "kind unknown": {"output_kinds": np.array([1, 1, 4], np.uint8)},
    "kinds too few": {"output_kinds": np.array([1], np.uint8)},
    "score without target": {"output_kinds": np.array([1, 1, 2], np.uint8)},
    "sample without plan": {"output_kinds": np.array([1, 1, 3], np.uint8)},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_batch_that_contradicts_itself_is_refused(name):
    with pytest.raises(ConfigError):
        load(random_checkpoint(tiny_spec())).forward(batch_with(**CONTRADICTIONS[name]))


def test_a_batch_of_too_many_rows_is_refused():
    decoder = load(random_checkpoint(tiny_spec()), LoadOptions(max_batch_tokens=2))
    with pytest.raises(ConfigError, match="1 to 2 token rows, got 3"):
        decoder.forward(make_batch([Run([1, 2, 3])]))
