"""The native decoder and the reference give the same bits: every switch, instruction set, dtype."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from batches import Draw, Run, logits_of, make_batch, make_plan, prompt_ids
from bitllm import _native
from bitllm.backends import get_backend
from bitllm.backends.base import Decoder, LoadOptions, OutputKind
from bitllm.checkpoint import Checkpoint
from bitllm.errors import QuantizationError, UnsupportedModelError
from synthetic import SWITCHES, random_checkpoint, tiny_spec

ISAS = _native.kernel_names()
GOLDEN = Path(__file__).parent / "golden" / "logits.json"


def load(device: str, checkpoint: Checkpoint, **options: object) -> Decoder:
    return get_backend(device).load(checkpoint, LoadOptions(**options))


def assert_same_bits(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


def test_the_scalar_kernels_are_always_there():
    assert "scalar" in ISAS


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch(switch, isa):
    spec = tiny_spec(**SWITCHES[switch])
    checkpoint = random_checkpoint(spec, seed=5)
    ids = prompt_ids(70, spec.vocab_size, seed=5)
    expected = logits_of(load("reference", checkpoint), ids)
    native = load("cpu", checkpoint, isa=isa, threads=2)
    assert_same_bits(logits_of(native, ids, [66, 67, 68]), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_every_dtype(dtype, kv_dtype, isa):
    checkpoint = random_checkpoint(tiny_spec(), dtype=dtype, granularity="row")
    ids = prompt_ids(40, 101)
    options = {"kv_dtype": kv_dtype}
    expected = logits_of(load("reference", checkpoint, **options), ids)
    assert_same_bits(logits_of(load("cpu", checkpoint, isa=isa, **options), ids), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("switch", ["sub_norms", "sliding_window", "float_activations_biased"])
def test_threads_pieces_and_batches_change_no_bit(switch, isa):
    checkpoint = random_checkpoint(tiny_spec(**SWITCHES[switch]))
    first, second = prompt_ids(75, 101, seed=1), prompt_ids(33, 101, seed=2)
    expected = logits_of(load("cpu", checkpoint, isa=isa, threads=1), first)
    for threads in (1, 2, 3):
        for cuts in ([], [1, 2, 3], [32], [31, 64]):
            decoder = load("cpu", checkpoint, isa=isa, threads=threads)
            assert_same_bits(logits_of(decoder, first, cuts), expected)
        runs = [Run(second, 0, [5, 0]), Run(first, 0, [7, 2, 6])]
        mixed = load("cpu", checkpoint, isa=isa, threads=threads).forward(make_batch(runs))
        assert_same_bits(mixed.logits[33:], expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("window", [None, 300])
def test_contexts_of_several_chunks(window, kv_dtype, isa):
    """More than 256 positions: chunks are merged, and shared by threads where tokens are few."""
    checkpoint = random_checkpoint(tiny_spec(sliding_window=window, max_context=800))
    ids, other = prompt_ids(600, 101, seed=1), prompt_ids(290, 101, seed=2)
    options = {"kv_dtype": kv_dtype, "kv_tokens": 1024, "max_batch_tokens": 600}
    expected = logits_of(load("reference", checkpoint, **options), ids)
    for threads in (1, 2, 3):
        native = load("cpu", checkpoint, isa=isa, threads=threads, **options)
        assert_same_bits(logits_of(native, ids, [512, 597, 598, 599]), expected)
        native.forward(make_batch([Run(other, 0, range(20, 30))]))
        last = [Run([ids[-1]], 599, range(19)), Run([ids[3]], 290, range(20, 30))]
        assert_same_bits(native.forward(make_batch(last)).logits[:1], expected[-1:])


def packed_checkpoint(
    granularity: str, group_size: int | None, zero_rows: float, activation_bits: int | None = 8
) -> Checkpoint:
    """Rows of a block and a part of one, in both packings; groups that do not divide them."""
    spec = tiny_spec(hidden_size=340, ffn_size=517, bias=True, activation_bits=activation_bits)
    return random_checkpoint(
        spec, granularity=granularity, group_size=group_size, zero_rows=zero_rows
    )


SCALES = [("tensor", None), ("row", None), ("group", 32), ("group", 96)]


@pytest.fixture(scope="module", params=[0.0, 0.4], ids=lambda share: f"zero_rows={share}")
def zero_rows(request) -> float:
    return request.param


@pytest.fixture(scope="module", params=[8, None], ids=lambda bits: f"bits={bits}")
def activation_bits(request) -> int | None:
    return request.param


@pytest.fixture(scope="module", params=SCALES, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def packed_model(request, zero_rows, activation_bits) -> tuple[Checkpoint, np.ndarray]:
    checkpoint = packed_checkpoint(*request.param, zero_rows, activation_bits)
    return checkpoint, logits_of(load("reference", checkpoint), prompt_ids(40, 101))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.parametrize("isa", ISAS)
def test_packings_scales_and_rows_of_zeros(packed_model, isa, packing, threads):
    checkpoint, expected = packed_model
    native = load("cpu", checkpoint, isa=isa, packing=packing, threads=threads)
    assert native.info.packing == packing
    assert_same_bits(logits_of(native, prompt_ids(40, 101), [37, 38, 39]), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("own_norms", [None, 1e-6])
@pytest.mark.parametrize("floats", [("q",), ("k", "up"), ("v", "gate", "o"), ("down",)])
def test_linears_of_one_layer_may_differ_in_their_activations(floats, own_norms, isa):
    spec = tiny_spec(linear_norm_eps=own_norms)
    layer = replace(
        spec.layers[0],
        **{name: replace(spec.layers[0].linear(name), activation_bits=None) for name in floats},
    )
    checkpoint = random_checkpoint(replace(spec, layers=(layer, spec.layers[1])))
    ids = prompt_ids(40, spec.vocab_size)
    expected = logits_of(load("reference", checkpoint), ids)
    native = load("cpu", checkpoint, isa=isa, threads=2)
    assert_same_bits(logits_of(native, ids, [38, 39]), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, None])
def test_matrices_of_nothing_but_zeros(bits, isa):
    checkpoint = packed_checkpoint("row", None, zero_rows=1.0, activation_bits=bits)
    ids = prompt_ids(9, 101)
    expected = logits_of(load("reference", checkpoint), ids)
    assert_same_bits(logits_of(load("cpu", checkpoint, isa=isa), ids, [8]), expected)


def test_rows_of_zeros_take_no_room():
    full, half = (
        load("cpu", packed_checkpoint("tensor", None, zero_rows)).info.weight_bytes
        for zero_rows in (0.0, 0.5)
    )
    dense = 2 * 101 * 340 * 2
    assert 0.4 < (half - dense) / (full - dense) < 0.65


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_a_layer_of_real_width(isa):
    """The widths of bitnet-b1.58-2B-4T: sums and tiles of the length they have there."""
    spec = tiny_spec(
        num_layers=1,
        vocab_size=1031,
        hidden_size=2560,
        ffn_size=6912,
        num_heads=20,
        num_kv_heads=5,
        head_dim=128,
        rope_theta=500000.0,
        attn_sub_norm=True,
        ffn_sub_norm=True,
        tied_head=True,
    )
    checkpoint = random_checkpoint(spec)
    ids = prompt_ids(70, spec.vocab_size)
    expected = logits_of(load("reference", checkpoint), ids)
    native = load("cpu", checkpoint, isa=isa, threads=2)
    assert_same_bits(logits_of(native, ids, [68, 69]), expected)


COMBINATIONS = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([1, 3, 17, 64, 97, 255, 257]),
        "ffn_size": st.sampled_from([1, 15, 63, 65, 256, 300]),
        "head_dim": st.sampled_from([2, 6, 16, 18]),
        "num_kv_heads": st.sampled_from([1, 2, 4]),
        "activation": st.sampled_from(["relu2", "silu", "gelu_tanh"]),
        "activation_bits": st.sampled_from([8, None]),
        "linear_norm_eps": st.sampled_from([None, 1e-6]),
        "sliding_window": st.sampled_from([None, 1, 31, 32, 33]),
        "embedding_scale": st.sampled_from([1.0, 0.3]),
    }
    | {
        name: st.booleans()
        for name in (
            "bias",
            "attn_norm",
            "ffn_norm",
            "attn_sub_norm",
            "ffn_sub_norm",
            "qk_norm",
            "post_norms",
            "tied_head",
        )
    }
)
MAGNITUDES = st.sampled_from([1e-20, 1e-6, 1.0, 1e4])


@settings(max_examples=20, deadline=None)
@given(
    switches=COMBINATIONS,
    magnitude=MAGNITUDES,
    cuts=st.sets(st.integers(1, 39)),
    isa=st.sampled_from(ISAS),
)
def test_every_combination_at_every_magnitude(switches, magnitude, cuts, isa):
    checkpoint = random_checkpoint(tiny_spec(**switches), granularity="row", magnitude=magnitude)
    ids = prompt_ids(40, 101)
    try:
        expected = logits_of(load("reference", checkpoint), ids)
    except QuantizationError:
        reject()  # without any norm, large weights leave the range of float32
    native = load("cpu", checkpoint, isa=isa, threads=2)
    assert_same_bits(logits_of(native, ids, sorted(cuts)), expected)


def test_denormal_numbers_are_computed_whatever_the_caller_has_set():
    """The norm of a block's output of 1e-20 has denormal squares, and a denormal epsilon."""
    spec = tiny_spec(post_norms=True, attn_sub_norm=True, activation="silu", norm_eps=1e-40)
    checkpoint = random_checkpoint(spec, magnitude=1e-20)
    ids = prompt_ids(40, 101)
    expected = logits_of(load("reference", checkpoint), ids)
    for threads in (1, 2):
        native = load("cpu", checkpoint, threads=threads)
        assert_same_bits(logits_of(native, ids), expected)
        torch.set_flush_denormal(True)
        try:
            flushed = logits_of(native, ids)
            assert np.float32(1e-30) * np.float32(1e-10) == 0, "the caller's mode is not restored"
        finally:
            torch.set_flush_denormal(False)
        assert_same_bits(flushed, expected)


def test_groups_that_kernels_cannot_cut_are_refused():
    checkpoint = random_checkpoint(tiny_spec(), granularity="group", group_size=48)
    with pytest.raises(UnsupportedModelError, match="each group of 48 weights") as caught:
        load("cpu", checkpoint)
    assert 'device="reference"' in str(caught.value)


# Sampling

VOCAB = 101
FRACTIONS = [0.01, 0.3, 0.5, 0.9, 0.999, 1.0]
DRAWS = st.builds(
    Draw,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 101, 1000]),
    top_p=st.sampled_from(FRACTIONS),
    min_p=st.sampled_from([0.0, *FRACTIONS]),
    typical_p=st.sampled_from([1.0, *FRACTIONS]),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 2**31 - 1),
    position=st.integers(0, 2**31 - 1),
    top_logprobs=st.sampled_from([-1, 0, 1, 5, 200]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    presence_penalty=st.sampled_from([0.0, 1.1]),
    seen=st.dictionaries(st.integers(0, VOCAB - 1), st.integers(0, 4), max_size=12),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-9.5, 2.25]), max_size=5),
    allowed=st.one_of(st.none(), st.frozensets(st.integers(0, VOCAB - 1), max_size=60)),
)


@pytest.fixture(scope="module")
def pair() -> tuple[Decoder, Decoder]:
    checkpoint = random_checkpoint(tiny_spec(num_layers=1), seed=8)
    return load("cpu", checkpoint, threads=2), load("reference", checkpoint)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(draws=st.lists(DRAWS, min_size=1, max_size=6), prompt=st.integers(0, 100))
def test_every_plan_draws_and_scores_the_same(pair, draws, prompt):
    ids = prompt_ids(3, VOCAB, seed=prompt)
    plan = make_plan(draws, VOCAB)
    batch = make_batch([Run(ids)], OutputKind.SAMPLE, rows=[2] * len(draws), plan=plan)
    native, reference = (decoder.forward(batch) for decoder in pair)
    np.testing.assert_array_equal(native.sampled, reference.sampled)
    np.testing.assert_array_equal(native.logprobs, reference.logprobs)
    np.testing.assert_array_equal(native.top_ids, reference.top_ids)
    np.testing.assert_array_equal(native.top_logprobs, reference.top_logprobs)


def test_logits_that_are_no_numbers_draw_nothing():
    """One row of the head is NaN, and so is the logit of its id, unless a mask forbids that id."""
    checkpoint = random_checkpoint(tiny_spec(num_layers=1), dtype="f32")
    checkpoint.source.dense_tensors["head"].data[70] = np.nan
    allowed = frozenset(range(60))
    draws = [
        Draw(**cuts, allowed=mask, top_logprobs=3)
        for cuts in (
            {"temperature": 0},
            {},
            {"top_k": 5},
            {"top_p": 0.8},
            {"min_p": 0.1},
            {"typical_p": 0.5},
        )
        for mask in (None, allowed)
    ]
    batch = make_batch(
        [Run(prompt_ids(3, VOCAB))],
        OutputKind.SAMPLE,
        rows=[2] * len(draws),
        plan=make_plan(draws, VOCAB),
    )
    native, reference = (load(name, checkpoint).forward(batch) for name in ("cpu", "reference"))
    assert (reference.sampled[::2] == -1).all()
    assert (reference.sampled[1::2] >= 0).all()
    np.testing.assert_array_equal(native.sampled, reference.sampled)
    np.testing.assert_array_equal(native.logprobs, reference.logprobs)
    np.testing.assert_array_equal(native.top_ids, reference.top_ids)
    np.testing.assert_array_equal(native.top_logprobs, reference.top_logprobs)


def test_scores_and_hidden_states_are_the_same(pair):
    ids = prompt_ids(6, VOCAB)
    scores = {
        "score_targets": np.array(ids[1:] + ids[:1], np.int32),
        "score_top_n": np.array([0, 1, 2, 3, 4, 200], np.int32),
    }
    native, reference = (
        decoder.forward(make_batch([Run(ids)], OutputKind.SCORE, **scores)) for decoder in pair
    )
    np.testing.assert_array_equal(native.logprobs, reference.logprobs)
    np.testing.assert_array_equal(native.top_ids, reference.top_ids)
    np.testing.assert_array_equal(native.top_logprobs, reference.top_logprobs)
    hidden = [decoder.forward(make_batch([Run(ids)], OutputKind.HIDDEN)).hidden for decoder in pair]
    assert_same_bits(*hidden)


# The golden hash


def golden_logits(isa: str, kv_dtype: str = "bf16") -> np.ndarray:
    """Logits of a fixed model on a fixed prompt, in pieces, over more than one chunk."""
    spec = tiny_spec(
        num_layers=3,
        vocab_size=1031,
        hidden_size=264,
        ffn_size=530,
        num_heads=6,
        num_kv_heads=3,
        head_dim=44,
        attn_sub_norm=True,
        ffn_sub_norm=True,
        tied_head=True,
    )
    checkpoint = random_checkpoint(spec, seed=2024)
    decoder = load("cpu", checkpoint, isa=isa, threads=2, kv_dtype=kv_dtype, kv_tokens=320)
    ids = prompt_ids(300, spec.vocab_size, seed=2024)
    return logits_of(decoder, ids, [64, 99, 298, 299])


def hash_of(logits: np.ndarray) -> str:
    return hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_the_golden_hash(kv_dtype, isa):
    """One hash for all machines: whoever changes a bit of the numerics changes this file too."""
    golden = json.loads(GOLDEN.read_text())[kv_dtype]
    logits = golden_logits(isa, kv_dtype)
    assert logits[-1].argmax() == golden["last_argmax"]
    assert hash_of(logits) == golden["sha256"]
