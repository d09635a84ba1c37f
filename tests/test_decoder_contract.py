"""What every backend promises to the engine: outputs, KV storage, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from batches import Draw, Run, logits_of, make_batch, make_plan, prompt_ids
from bitllm.backends import get_backend
from bitllm.backends.base import Backend, Batch, Decoder, LoadOptions, OutputKind, SamplePlan
from bitllm.backends.cuda import CudaBackend
from bitllm.checkpoint import Checkpoint, DenseTensor, ModelSpec
from bitllm.errors import (
    ConfigError,
    MissingTensorError,
    QuantizationError,
    TensorShapeError,
)
from synthetic import MemorySource, random_checkpoint, tiny_spec

Load = Callable[..., Decoder]


@pytest.fixture(params=["reference", "cpu", "mlx", "cuda without a GPU"])
def load(request: pytest.FixtureRequest) -> Load:
    """Load a checkpoint with the options given by name."""
    if request.param == "cuda without a GPU":
        backend: Backend = CudaBackend(torch.device("cpu"), kernels=False)
    else:
        backend = get_backend(request.param)

    def loaded(checkpoint: Checkpoint, **options: object) -> Decoder:
        return backend.load(checkpoint, LoadOptions(**options))

    return loaded


def assert_same_logits(decoder: Decoder, one: np.ndarray, other: np.ndarray) -> None:
    """To the bit whatever the batch, but for libraries that choose the order of sums."""
    if decoder.info.backend in ("cuda", "mlx"):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    else:
        assert (one == other).all()


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


def test_each_row_gets_what_it_asked_for(load):
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


def test_the_hidden_state_is_that_after_the_final_norm(load):
    checkpoint = random_checkpoint(tiny_spec(tied_head=True), dtype="f32")
    batch = make_batch([Run(prompt_ids(4, 101))], OutputKind.HIDDEN)
    decoder = load(checkpoint)
    hidden = decoder.forward(batch).hidden
    logits = logits_of(decoder, prompt_ids(4, 101))
    exact = hidden.astype(np.float64) @ checkpoint.dense("embed").to_float32().T
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


def test_a_step_may_want_nothing_back(load):
    decoder = load(random_checkpoint(tiny_spec()))
    ids = prompt_ids(6, 101)
    output = decoder.forward(make_batch([Run(ids[:5])], rows=[]))
    assert output.logits.shape == (0, 101)
    assert output.hidden.shape == (0, 44)
    assert output.top_ids.shape == (0, 0)
    rest = decoder.forward(make_batch([Run(ids[5:], 5)])).logits
    assert_same_logits(decoder, rest, logits_of(load(random_checkpoint(tiny_spec())), ids)[5:])


# KV storage


def test_blocks_can_be_copied_read_and_written(load):
    checkpoint = random_checkpoint(tiny_spec())
    ids = prompt_ids(40, 101)
    decoder, other = load(checkpoint), load(checkpoint)
    whole = decoder.forward(make_batch([Run(ids, 0, [3, 4])])).logits
    decoder.copy_blocks(np.array([[3, 6], [6, 0]], np.int32))
    after_copy = decoder.forward(make_batch([Run(ids[32:], 32, [0, 5])])).logits
    assert_same_logits(decoder, after_copy, whole[32:])

    data = decoder.read_blocks(np.array([4, 3], np.int32))
    assert data.shape == (2, decoder.info.kv_bytes // decoder.kv_capacity)
    other.write_blocks(np.array([1, 7], np.int32), data)
    assert (other.read_blocks(np.array([7, 1], np.int32)) == data[::-1]).all()
    last = other.forward(make_batch([Run(ids[39:], 39, [7, 1])])).logits
    assert_same_logits(other, last, whole[39:])


@pytest.mark.parametrize("blocks", [[-1], [8]])
def test_unknown_blocks_are_refused(load, blocks):
    decoder = load(random_checkpoint(tiny_spec()))
    ids = np.array(blocks, np.int32)
    with pytest.raises(ConfigError, match="block"):
        decoder.read_blocks(ids)
    with pytest.raises(ConfigError, match="block"):
        decoder.copy_blocks(np.array([[0, blocks[0]]], np.int32))


@pytest.mark.parametrize("wrong", [np.zeros((1, 7), np.uint8), np.zeros((2, 10240), np.uint8)])
def test_bytes_of_another_size_are_not_written(load, wrong):
    decoder = load(random_checkpoint(tiny_spec()))
    with pytest.raises(ConfigError, match="block"):
        decoder.write_blocks(np.zeros(1, np.int32), wrong)


def test_a_closed_decoder_computes_nothing(load):
    decoder = load(random_checkpoint(tiny_spec()))
    decoder.close()
    with pytest.raises(ConfigError):
        decoder.forward(make_batch([Run([1])]))


# Refusals


def without(checkpoint: Checkpoint, name: str) -> Checkpoint:
    source = checkpoint.source
    assert isinstance(source, MemorySource)
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
def test_a_missing_tensor_is_named(load, name):
    checkpoint = random_checkpoint(tiny_spec(**FULL))
    with pytest.raises(MissingTensorError, match=f"'{name}' is missing"):
        load(without(checkpoint, name))


def test_a_tensor_of_another_shape_is_named(load):
    checkpoint = random_checkpoint(tiny_spec())
    other = random_checkpoint(tiny_spec(ffn_size=71))
    with pytest.raises(TensorShapeError, match=r"'layers.0.gate' has shape \[71, 44\]"):
        load(replace(checkpoint, source=other.source))


def test_a_code_that_is_not_ternary_is_refused(load):
    checkpoint = random_checkpoint(tiny_spec())
    checkpoint.ternary("layers.1.v").packed[7, 3] = 0xFF
    with pytest.raises(QuantizationError):
        load(checkpoint)


def batch_with(**fields) -> Batch:
    return replace(make_batch([Run([1, 2, 3])]), **fields)


I32 = np.int32
TWO_RUNS = {"block_tables": np.array([[0], [1]], I32), "adapter_slots": np.full(2, -1, I32)}
CONTRADICTIONS = {
    "no tokens": {"token_ids": np.zeros(0, I32)},
    "id too high": {"token_ids": np.array([1, 101, 3], I32)},
    "negative id": {"token_ids": np.array([1, -1, 3], I32)},
    "runs do not cover": {"run_offsets": np.array([0, 2], I32)},
    "empty run": {"run_offsets": np.array([0, 0, 3], I32), **TWO_RUNS},
    "falling runs": {"run_offsets": np.array([0, 4, 3], I32), **TWO_RUNS},
    "runs without tables": {"run_offsets": np.array([0, 1, 3], I32)},
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
    "two runs write one block": {
        "run_offsets": np.array([0, 2, 3], I32),
        "positions": np.array([32, 33, 5], I32),
        "block_tables": np.array([[4, 6], [6, 5]], I32),
        "adapter_slots": np.full(2, -1, I32),
    },
    "a run writes one block twice": {
        "positions": np.array([31, 32, 33], I32),
        "block_tables": np.array([[4, 4]], I32),
    },
    "sample without plan": {"output_kinds": np.array([1, 1, 3], np.uint8)},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_batch_that_contradicts_itself_is_refused(load, name):
    with pytest.raises(ConfigError):
        load(random_checkpoint(tiny_spec())).forward(batch_with(**CONTRADICTIONS[name]))


def test_runs_may_read_one_block_and_write_others(load):
    decoder, ids = load(random_checkpoint(tiny_spec())), prompt_ids(33, 101)
    expected = logits_of(decoder, ids)
    runs = [Run(ids[32:], 32, [0, 5]), Run(ids[32:], 32, [0, 6])]
    for _ in range(2):  # what a step has written, the next one may write again
        logits = decoder.forward(make_batch(runs)).logits
        assert_same_logits(decoder, logits, expected[[32, 32]])


def spoilt(dense: dict[str, float], spec: ModelSpec) -> Checkpoint:
    """A checkpoint whose dense tensors of these names have this value at the start of row 7."""
    checkpoint = random_checkpoint(spec, dtype="f32")
    tensors = dict(checkpoint.source.dense_tensors)
    for name, value in dense.items():
        values = tensors[name].to_float32().copy()
        values[7, ...].reshape(-1)[:1] = value
        tensors[name] = DenseTensor(values, "f32")
    source = MemorySource(tensors, checkpoint.source.ternary_matrices)
    return replace(checkpoint, source=source)


SPOILT = {
    "embedding NaN": ({}, {"embed": np.nan}),
    "embedding infinite": ({}, {"embed": np.inf}),
    "embedding infinite, one norm each": ({"linear_norm_eps": 1e-6}, {"embed": -np.inf}),
    "scores": ({"qk_norm": True}, {"layers.1.q_norm": 3e38, "layers.1.k_norm": -3e38}),
    "scores, normalised after": (
        {"qk_norm": True, "attn_sub_norm": True},
        {"layers.1.q_norm": 3e38, "layers.1.k_norm": 3e38},
    ),
    "relu2": ({"ffn_sub_norm": True}, {"layers.1.ffn_norm": 3e38}),
    "embedding NaN, floats": ({"activation_bits": None}, {"embed": np.nan}),
    "relu2, floats": ({"ffn_sub_norm": True, "activation_bits": None}, {"layers.1.ffn_norm": 3e38}),
}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("count", [1, 40])
def test_activations_that_are_no_numbers_are_refused(load, name, count):
    switches, values = SPOILT[name]
    decoder = load(spoilt(values, tiny_spec(**switches)))
    batch = make_batch([Run([7] * count)])
    with pytest.raises(QuantizationError, match="only finite numbers"):
        decoder.forward(batch)
    if "embed" in values:  # other tokens are as good as before
        ids = [i if i != 7 else 8 for i in prompt_ids(33, 101)]
        fresh = load(random_checkpoint(tiny_spec(**switches), dtype="f32"))
        assert (logits_of(decoder, ids) == logits_of(fresh, ids)).all()


def test_a_batch_of_too_many_rows_is_refused(load):
    decoder = load(random_checkpoint(tiny_spec()), max_batch_tokens=2)
    with pytest.raises(ConfigError, match="token rows"):
        decoder.forward(make_batch([Run([1, 2, 3])]))


PLAN_CONTRADICTIONS = {
    "negative temperature": {"temperature": np.array([-1.0], np.float32)},
    "temperature no number": {"temperature": np.array([np.nan], np.float32)},
    "negative top_k": {"top_k": np.array([-1], I32)},
    "top_p zero": {"top_p": np.array([0.0], np.float32)},
    "top_p above one": {"top_p": np.array([1.5], np.float32)},
    "min_p above one": {"min_p": np.array([1.5], np.float32)},
    "typical_p zero": {"typical_p": np.array([0.0], np.float32)},
    "no repetition penalty": {"repetition_penalty": np.array([0.0], np.float32)},
    "mask row unknown": {"mask_rows": np.array([0], I32)},
    "mask too narrow": {"mask": np.zeros((1, 3), np.uint32), "mask_rows": np.array([0], I32)},
    "seen id unknown": {
        "seen_offsets": np.array([0, 1], I32),
        "seen_ids": np.array([101], I32),
        "seen_counts": np.array([1], I32),
    },
    "counts too few": {"seen_offsets": np.array([0, 1], I32), "seen_ids": np.array([1], I32)},
    "offsets fall": {"seen_offsets": np.array([0, -1], I32)},
    "offsets beyond the list": {"bias_offsets": np.array([0, 1], I32)},
    "bias id unknown": {
        "bias_offsets": np.array([0, 1], I32),
        "bias_ids": np.array([-1], I32),
        "bias_values": np.array([1.0], np.float32),
    },
    "too few entries": {"seed": np.zeros(0, np.uint64)},
}


@pytest.mark.parametrize("name", PLAN_CONTRADICTIONS)
def test_a_plan_that_contradicts_itself_is_refused(load, name):
    plan = replace(SamplePlan.greedy(1), **PLAN_CONTRADICTIONS[name])
    batch = make_batch([Run([1, 2, 3])], OutputKind.SAMPLE, rows=[2], plan=plan)
    with pytest.raises(ConfigError):
        load(random_checkpoint(tiny_spec())).forward(batch)


def test_a_target_outside_the_vocabulary_is_refused(load):
    scores = {"score_targets": np.array([101], I32), "score_top_n": np.zeros(1, I32)}
    batch = make_batch([Run([1, 2, 3])], OutputKind.SCORE, rows=[2], **scores)
    with pytest.raises(ConfigError):
        load(random_checkpoint(tiny_spec())).forward(batch)


def test_output_kinds_are_plain_numbers() -> None:
    """NumPy calls Python methods of other types, and loses an interrupt that arrives in one."""
    kinds = (OutputKind.HIDDEN, OutputKind.LOGITS, OutputKind.SCORE, OutputKind.SAMPLE)
    assert [type(kind) for kind in kinds] == [int] * OutputKind.COUNT
    assert kinds == tuple(range(OutputKind.COUNT))
