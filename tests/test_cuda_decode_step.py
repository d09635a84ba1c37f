"""Decode steps of the cuda backend in fixed shapes: filled up, run again, and nothing else changed.

Here, without a GPU, the function that would be captured in a graph runs on the same buffers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from batches import Run, make_batch, prompt_ids
from bitllm.backends.base import LoadOptions, OutputKind, SamplePlan
from bitllm.backends.cuda import CudaBackend, CudaDecoder
from bitllm.backends.cuda.decode_step import ROWS, _width
from bitllm.errors import QuantizationError
from synthetic import random_checkpoint, tiny_spec

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
TEXTS = [Run(prompt_ids(count, 101, count), 0, [block]) for block, count in enumerate((2, 1, 3))]
NEXT = [Run([7 + i], len(run.ids), [i]) for i, run in enumerate(TEXTS)]


def load(**switches: Any) -> CudaDecoder:
    checkpoint = random_checkpoint(tiny_spec(num_layers=1, **switches), seed=5, dtype="f32")
    options = LoadOptions(kv_tokens=128, kv_dtype="fp32")
    return CudaBackend(CPU).load(checkpoint, options)


def greedy(runs: list[Run]) -> Any:
    return make_batch(runs, OutputKind.SAMPLE, plan=SamplePlan.greedy(len(runs)))


@pytest.fixture
def pair() -> tuple[CudaDecoder, CudaDecoder]:
    """Two decoders that have read the same texts; the second computes every step as it comes."""
    decoders = load(), load()
    for decoder in decoders:
        decoder.forward(make_batch(TEXTS, rows=[]))
    decoders[1]._decode_steps = None
    return decoders


def test_steps_that_are_filled_up_compute_the_same(pair):
    shaped, eager = pair
    before = shaped.read_blocks(np.array([3], np.int32))
    found, wanted = (each.forward(make_batch(NEXT)).logits for each in pair)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert list(shaped._decode_steps._shapes) == [(4, 8)]
    # Filling up wrote to no block of the engine's.
    blocks = np.arange(4, dtype=np.int32)
    kept, expected = (each.read_blocks(blocks).view(np.float32) for each in (shaped, eager))
    np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-5)
    assert (shaped.read_blocks(np.array([3], np.int32)) == before).all()


def test_a_shape_is_used_again_and_keeps_nothing_of_the_step_before(pair):
    shaped, _ = pair
    for decoder in pair:
        decoder.forward(greedy(NEXT))
    fewer = [Run([40], len(TEXTS[1].ids) + 1, [1]), Run([1], len(TEXTS[0].ids) + 1, [0]), NEXT[2]]
    for runs in (fewer, fewer[:1]):
        tokens = [each.forward(greedy(runs)).sampled.tolist() for each in pair]
        assert tokens[0] == tokens[1]
    assert list(shaped._decode_steps._shapes) == [(4, 8), (1, 8)]


def test_prompts_and_hidden_states_are_computed_as_they_come(pair):
    steps = pair[0]._decode_steps
    assert not steps.fits(make_batch([Run([1, 2])]))
    assert not steps.fits(make_batch(NEXT, OutputKind.HIDDEN))
    assert not steps.fits(make_batch(NEXT, rows=[2, 1, 0]))
    assert steps.fits(make_batch(NEXT))
    many = [Run([1], 0, [block]) for block in range(ROWS[-1] + 1)]
    assert not steps.fits(greedy(many))
    found, wanted = (each.forward(make_batch(NEXT, OutputKind.HIDDEN)).hidden for each in pair)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_damage_of_one_row_is_found_and_damage_that_only_fills_up_is_not(pair):
    shaped, _ = pair
    shaped._embed[0, 0] = torch.nan  # the token that fills up
    shaped.forward(greedy(NEXT))
    shaped._embed[9, 0] = torch.nan  # the last of the three
    with pytest.raises(QuantizationError, match="only finite numbers"):
        shaped.forward(greedy(NEXT))


@pytest.mark.parametrize(("blocks", "width"), [(1, 8), (8, 8), (9, 16), (16, 16), (33, 64)])
def test_table_widths_are_powers_of_two(blocks, width):
    assert _width(blocks) == width
