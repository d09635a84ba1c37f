"""A screened head draws the tokens of the full one, whatever the head, the plan and the batch.

Every test compares two decoders of one model, row by row, and prints how many rows of the head the
screen computed exactly and how often it read the whole head after all (`pytest -s` shows them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bitllm
from batches import Draw, Run, make_batch, make_plan, prompt_ids
from bitllm.backends.base import KV_BLOCK_SIZE, LoadOptions, OutputKind, StepOutput
from bitllm.backends.cpu import CpuBackend
from bitllm.checkpoint import Checkpoint, ModelSpec
from bitllm.formats import open_checkpoint
from synthetic import MemorySource, dense_tensor, random_checkpoint, random_uniform, tiny_spec

DEMO = Path(bitllm.__file__).parent / "demo"
SCREENS = ["screened", "int8-screened"]
ROWS = 64  # positions of a batch

F32 = np.ndarray
Plans = Callable[[int, int], Draw]  # (row, vocabulary) -> its entry


def options(head: str, threads: int = 1) -> LoadOptions:
    return LoadOptions(head=head, threads=threads, kv_tokens=256, max_batch_tokens=ROWS)


def hidden_states(checkpoint: Checkpoint, ids: Sequence[int]) -> F32:
    decoder = CpuBackend().load(checkpoint, options("full"))
    return decoder.forward(make_batch([Run(ids)], OutputKind.HIDDEN)).hidden


# --- heads ----------------------------------------------------------------------------------------


def random_head(spec: ModelSpec, hidden: F32) -> F32:
    return random_uniform(3, "head", (spec.vocab_size, spec.hidden_size))


def confident_head(spec: ModelSpec, hidden: F32) -> F32:
    """Each hidden state points at a row of its own."""
    head = random_head(spec, hidden)
    rows = np.arange(len(hidden)) * 7 % spec.vocab_size
    head[rows] = hidden * (3.0 / np.linalg.norm(hidden, axis=1, keepdims=True))
    return head


def near_ties(spec: ModelSpec, hidden: F32) -> F32:
    """Rows that differ from their neighbours by one step of bf16 in one column."""
    head = np.repeat(random_head(spec, hidden)[::8], 8, axis=0)[: spec.vocab_size]
    columns = np.arange(spec.vocab_size) % spec.hidden_size
    head[np.arange(spec.vocab_size), columns] *= 1.0 + 2.0**-7
    return head


def exact_ties(spec: ModelSpec, hidden: F32) -> F32:
    """Every row several times, far apart and side by side."""
    head = random_head(spec, hidden)
    return head[np.arange(spec.vocab_size) // 2 % (spec.vocab_size // 6)]


def huge_norms(spec: ModelSpec, hidden: F32) -> F32:
    """Rows of very different size, and one column that outweighs the others."""
    powers = 12.0 * random_uniform(4, "powers", (spec.vocab_size, 1))
    head = random_head(spec, hidden) * np.exp2(np.round(powers))
    head[:, 5] *= 100.0
    return head


def zero_rows(spec: ModelSpec, hidden: F32) -> F32:
    head = random_head(spec, hidden)
    head[::3] = 0.0
    head[1::3, : spec.hidden_size // 2] = 0.0
    return head


def beyond_margins(spec: ModelSpec, hidden: F32) -> F32:
    """Numbers so small that their squares are none."""
    return random_head(spec, hidden) * np.float32(2.0**-100)


HEADS = [
    random_head,
    confident_head,
    near_ties,
    exact_ties,
    huge_norms,
    zero_rows,
    beyond_margins,
]


def with_head(make: Callable[[ModelSpec, F32], F32], spec: ModelSpec, dtype: str) -> Checkpoint:
    plain = random_checkpoint(spec, seed=2)
    hidden = hidden_states(plain, prompt_ids(ROWS, spec.vocab_size))
    tensors = {**plain.source.dense_tensors}
    tensors["head"] = dense_tensor(make(spec, hidden).astype(np.float32), dtype)
    return replace(plain, source=MemorySource(tensors, plain.source.ternary_matrices))


# --- plans ----------------------------------------------------------------------------------------


def some_ids(row: int, vocab: int, count: int) -> list[int]:
    return [(row * 31 + i * i * 7 + i) % vocab for i in range(count)]


def warmth(row: int) -> float:
    return (0.1, 0.4, 0.8, 1.0, 1.7)[row % 5]


PLANS: dict[str, Plans] = {
    "greedy": lambda row, vocab: Draw(temperature=0.0),
    "temperature": lambda row, vocab: Draw(warmth(row), seed=row, position=row),
    "top-k": lambda row, vocab: Draw(warmth(row), top_k=1 + row % 40, seed=row),
    "top-k, hot": lambda row, vocab: Draw(300.0, top_k=2 + row % 9, seed=row),
    "top-k, top-p, min-p": lambda row, vocab: Draw(
        warmth(row), top_k=20, top_p=0.9, min_p=0.02, seed=row
    ),
    "min-p": lambda row, vocab: Draw(warmth(row), min_p=(0.02, 0.3)[row % 2], seed=row),
    "top-p": lambda row, vocab: Draw(warmth(row), top_p=(0.5, 0.9, 0.99)[row % 3], seed=row),
    "top-p, min-p": lambda row, vocab: Draw(warmth(row), top_p=0.95, min_p=0.05, seed=row),
    "typical": lambda row, vocab: Draw(
        warmth(row), typical_p=(0.2, 0.9)[row % 2], top_k=row % 3 * 30, seed=row
    ),
    "penalties": lambda row, vocab: Draw(
        (0.0, 0.7)[row % 2],
        repetition_penalty=(1.3, 0.6)[row // 2 % 2],
        frequency_penalty=(0.2, -0.3)[row // 4 % 2],
        presence_penalty=0.1,
        seen={token: token % 3 for token in some_ids(row, vocab, 25)},
        top_p=(1.0, 0.9)[row // 8 % 2],
        seed=row,
    ),
    "bias": lambda row, vocab: Draw(
        (0.0, 0.7)[row % 2],
        bias={token: (token % 7 - 3) * 0.7 for token in some_ids(row, vocab, 9)},
        top_k=(0, 5)[row // 2 % 2],
        min_p=(0.0, 0.1)[row // 4 % 2],
        seed=row,
    ),
    "mask": lambda row, vocab: Draw(
        (0.0, 0.7)[row % 2],
        allowed=frozenset(some_ids(row, vocab, row % 7 * row)),
        bias=dict.fromkeys(some_ids(row + 1, vocab, 5), 1.0),
        top_p=(1.0, 0.8)[row // 2 % 2],
        seed=row,
    ),
    "log-probabilities": lambda row, vocab: Draw(warmth(row), top_logprobs=2, seed=row),
}


def sample(decoder, ids: Sequence[int], plan: Plans):
    vocab = decoder.spec.vocab_size
    draws = [plan(row, vocab) for row in range(len(ids))]
    blocks = range(-(-len(ids) // KV_BLOCK_SIZE))
    return decoder.forward(
        make_batch([Run(ids, 0, blocks)], OutputKind.SAMPLE, plan=make_plan(draws, vocab))
    )


def report(name: str, decoder) -> None:
    counts = decoder.head_statistics
    rows = max(counts["screened"], 1)
    share = counts["rescored"] / rows / decoder.spec.vocab_size
    print(
        f"{name}: {counts['screened']} rows screened, {share:.2%} of the head computed exactly, "
        f"{counts['full'] / rows:.2%} read all of it"
    )


def assert_same_tokens(checkpoint: Checkpoint, screen: str, plans: dict[str, Plans], batches: int):
    """Compare the screen with the full head, each plan on its own decoder for the counts."""
    vocab = checkpoint.spec.vocab_size
    full = CpuBackend().load(checkpoint, options("full"))
    for name, plan in plans.items():
        screened = CpuBackend().load(checkpoint, options(screen, threads=2))
        for seed in range(batches):
            ids = prompt_ids(ROWS, vocab, seed)
            expected, found = sample(full, ids, plan), sample(screened, ids, plan)
            assert found.sampled.tolist() == expected.sampled.tolist(), name
            np.testing.assert_array_equal(found.logprobs, expected.logprobs)
        report(f"{screen}, {name}", screened)


# --- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("make", HEADS, ids=lambda make: make.__name__)
def test_the_tokens_of_any_head(make, screen):
    spec = tiny_spec(vocab_size=1500, hidden_size=100)
    assert_same_tokens(with_head(make, spec, "bf16"), screen, PLANS, batches=1)


@pytest.mark.slow
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("make", HEADS, ids=lambda make: make.__name__)
def test_the_tokens_of_any_large_head(make, screen):
    spec = tiny_spec(vocab_size=20000, hidden_size=320)
    assert_same_tokens(with_head(make, spec, "bf16"), screen, PLANS, batches=3)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_heads_stored_in_other_types(dtype, screen):
    spec = tiny_spec(vocab_size=700, hidden_size=64)
    plans = {name: PLANS[name] for name in ("greedy", "temperature", "top-p")}
    assert_same_tokens(with_head(random_head, spec, dtype), screen, plans, batches=1)


@pytest.mark.parametrize("screen", SCREENS)
def test_the_tokens_of_the_demo_model(screen):
    assert_same_tokens(open_checkpoint(DEMO), screen, PLANS, batches=1)


@pytest.mark.slow
@pytest.mark.parametrize("screen", SCREENS)
def test_ten_thousand_tokens_of_the_demo_model(screen):
    assert_same_tokens(open_checkpoint(DEMO), screen, PLANS, batches=15)


def mixed_batch(vocab: int):
    """One sequence whose rows ask for everything in turn."""
    kinds = np.arange(ROWS, dtype=np.uint8) % OutputKind.COUNT
    rows = np.flatnonzero(kinds == OutputKind.SAMPLE).tolist()
    plans = list(PLANS.values())
    draws = [plans[i % len(plans)](row, vocab) for i, row in enumerate(rows)]
    scored = int((kinds == OutputKind.SCORE).sum())
    batch = make_batch(
        [Run(prompt_ids(ROWS, vocab))],
        plan=make_plan(draws, vocab),
        score_targets=np.arange(scored, dtype=np.int32),
        score_top_n=np.full(scored, 2, np.int32),
    )
    return replace(batch, output_kinds=kinds)


@pytest.mark.parametrize("head", SCREENS)
def test_batches_and_threads_change_nothing(head):
    spec = tiny_spec(vocab_size=1500, hidden_size=100)
    checkpoint = with_head(confident_head, spec, "bf16")
    batch = mixed_batch(spec.vocab_size)
    expected = CpuBackend().load(checkpoint, options("full")).forward(batch)
    counts = []
    for threads in (1, 2, 3):
        decoder = CpuBackend().load(checkpoint, options(head, threads))
        found = decoder.forward(batch)
        for name in StepOutput.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
        counts.append(decoder.head_statistics)
    assert counts[0] == counts[1] == counts[2]


# --- which head is used, and what it costs --------------------------------------------------------


def test_a_confident_head_is_hardly_read():
    spec = tiny_spec(vocab_size=4000, hidden_size=128)
    decoder = CpuBackend().load(with_head(confident_head, spec, "bf16"), options("screened"))
    for plan in ("greedy", "temperature", "top-p"):
        sample(decoder, prompt_ids(ROWS, spec.vocab_size), PLANS[plan])
    counts = decoder.head_statistics
    assert counts["screened"] == 3 * ROWS
    assert counts["full"] <= 0.1 * counts["screened"]
    assert counts["rescored"] <= 0.02 * counts["screened"] * spec.vocab_size


def test_the_kind_is_named_and_a_small_head_is_full():
    checkpoint = random_checkpoint(tiny_spec())
    for head in ("full", "screened", "int8-screened", "int8"):
        assert CpuBackend().load(checkpoint, options(head)).info.head == head
    decoder = CpuBackend().load(checkpoint, options("auto"))
    assert decoder.info.head == "full"
    assert decoder.head_statistics == {"screened": 0, "rescored": 0, "full": 0}


def test_a_large_head_is_screened():
    spec = tiny_spec(vocab_size=1 << 16, hidden_size=256)
    assert CpuBackend().load(random_checkpoint(spec), options("auto")).info.head == "screened"


@pytest.mark.parametrize("head", ["screened", "int8-screened", "int8"])
def test_a_head_with_nan_is_read_as_it_is(head):
    spec = tiny_spec(vocab_size=300)

    def broken(spec: ModelSpec, hidden: F32) -> F32:
        values = random_head(spec, hidden)
        values[250, 3] = np.nan
        return values

    checkpoint = with_head(broken, spec, "bf16")
    decoder = CpuBackend().load(checkpoint, options(head))
    assert decoder.info.head == "full"
    assert set(sample(decoder, prompt_ids(9, 300), PLANS["greedy"]).sampled) == {-1}


def test_int8_logits_are_those_of_the_rounded_head():
    spec = tiny_spec(vocab_size=700, hidden_size=64)
    checkpoint = with_head(random_head, spec, "f32")
    stored = checkpoint.source.dense_tensors["head"].data
    scales = np.abs(stored).max(axis=1, keepdims=True) / np.float32(127)
    rounded = {**checkpoint.source.dense_tensors}
    rounded["head"] = dense_tensor(np.rint(stored / scales) * scales, "f32")
    source = MemorySource(rounded, checkpoint.source.ternary_matrices)
    batch = make_batch([Run(prompt_ids(ROWS, spec.vocab_size))])
    expected = CpuBackend().load(replace(checkpoint, source=source), options("full"))
    decoder = CpuBackend().load(checkpoint, options("int8", threads=2))
    found = decoder.forward(batch).logits
    np.testing.assert_allclose(found, expected.forward(batch).logits, rtol=1e-4, atol=1e-4)
    greedy = sample(decoder, prompt_ids(ROWS, spec.vocab_size), PLANS["greedy"])
    assert greedy.sampled.tolist() == found.argmax(axis=1).tolist()
