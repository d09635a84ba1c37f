"""Tokens drawn by the cuda backend's own sampler are those of the host, for the same logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from batches import Draw, Run, make_batch, make_plan
from bitllm.backends.base import OutputKind
from bitllm.backends.cuda.kernels.noise import perturb
from bitllm.backends.cuda.sampling import _exp, draw, draws_here
from bitllm.backends.numerics import exp_f32, gumbel_noise
from bitllm.backends.sampling import draw_token
from synthetic import random_uniform

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

VOCAB = 1203
ODD = frozenset(range(1, VOCAB, 2))
DRAWS = {
    "greedy": Draw(temperature=0.0),
    "temperature": Draw(temperature=0.8, seed=2**63 + 5, choice=3, position=17),
    "hot": Draw(temperature=5.0, seed=1),
    "next to cold": Draw(temperature=1e-42, top_p=0.9),
    "top-k": Draw(top_k=7, seed=3),
    "top-k of one": Draw(top_k=1, seed=3),
    "more than all": Draw(top_k=5000, seed=4),
    "top-p": Draw(temperature=2.0, top_p=0.7, seed=5),
    "tiny top-p": Draw(temperature=2.0, top_p=1e-9, seed=5),
    "min-p": Draw(temperature=1.5, min_p=0.2, seed=6),
    "all cuts": Draw(temperature=3.0, top_k=300, top_p=0.8, min_p=0.05, seed=7),
    "bias": Draw(bias={5: 30.0, 900: -3.0}, seed=8),
    "bias, greedy": Draw(temperature=0.0, bias={5: 30.0}),
    "penalties": Draw(
        repetition_penalty=1.7,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        seen={i: i % 3 for i in range(0, VOCAB, 2)},
        seed=9,
    ),
    "penalties, greedy": Draw(temperature=0.0, repetition_penalty=9.0, seen=dict.fromkeys(ODD, 0)),
    "mask": Draw(allowed=ODD, seed=10),
    "mask and top-k": Draw(allowed=frozenset({1, 31, 32, 1202}), top_k=9, seed=11),
    "nothing allowed": Draw(allowed=frozenset()),
    "nothing allowed, greedy": Draw(temperature=0.0, allowed=frozenset()),
}


def some_logits(rows: int) -> np.ndarray:
    logits = random_uniform(1, "logits", (rows, VOCAB)) * np.float32(8)
    logits[:, 40:60] = logits[:, 40:41]  # ties
    logits[:, 100], logits[:, 101] = 0.0, -0.0
    return logits


@pytest.mark.parametrize("case", DRAWS)
def test_the_host_draws_the_same(case):
    """At 6 positions of the output, each with logits of its own."""
    draws = [replace(DRAWS[case], position=position) for position in range(6)]
    plan, logits = make_plan(draws, VOCAB), some_logits(6)
    wanted = [draw_token(plan, entry, row) for entry, row in enumerate(logits)]
    assert draw(plan, torch.from_numpy(logits)).tolist() == wanted
    if case == "temperature":
        assert len(set(wanted)) > 3


def test_rows_of_one_step_do_not_meet():
    plan, logits = make_plan(list(DRAWS.values()), VOCAB), some_logits(len(DRAWS))
    wanted = [draw_token(plan, entry, row) for entry, row in enumerate(logits)]
    assert draw(plan, torch.from_numpy(logits)).tolist() == wanted


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_numbers_give_no_token(temperature):
    logits = some_logits(2)
    logits[1, 7] = np.nan
    plan = make_plan([Draw(temperature=temperature)] * 2, VOCAB)
    found = draw(plan, torch.from_numpy(logits)).tolist()
    assert found == [draw_token(plan, 0, logits[0]), -1]


def test_noise_is_that_of_the_contract_to_the_bit():
    logits, seed = some_logits(2), 2**63 + 77
    keys = torch.tensor([[seed & 0xFFFFFFFF, seed >> 32, 12, 3], [5, 0, 0, 0]])
    found = perturb(torch.from_numpy(logits), torch.tensor([0.7, 0.0]), keys)
    noise = gumbel_noise(seed, 3, 12, np.arange(VOCAB, dtype=np.int32))
    wanted = logits[0].astype(np.float64) / np.float64(np.float32(0.7)) + noise
    assert (found[0].numpy() == wanted).all()
    assert (found[1].numpy() == logits[1]).all()


def test_exponentials_are_those_of_the_contract_to_the_bit():
    x = np.concatenate([np.linspace(-100, 100, 4001), [-87.0, 88.0, 0.0, -np.inf]])
    x = x.astype(np.float32)
    assert (_exp(torch.from_numpy(x)).numpy() == exp_f32(x)).all()
    assert torch.isnan(_exp(torch.tensor([torch.nan]))).all()


def test_what_is_rare_is_left_to_the_host():
    def batch(draw_of: Draw, kind: int = OutputKind.SAMPLE):
        plan = make_plan([draw_of], VOCAB)
        return make_batch([Run([1])], kind, plan=plan)

    assert draws_here(batch(DRAWS["all cuts"]))
    assert draws_here(batch(Draw(temperature=0.0, typical_p=0.5)))
    assert not draws_here(batch(Draw(typical_p=0.5)))
    assert not draws_here(batch(Draw(top_logprobs=0)))
    assert not draws_here(batch(Draw(), OutputKind.LOGITS))
