"""The PyTorch decoder computes what the reference decoder computes, on every switch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from batches import logits_of, prompt_ids
from bitllm.backends.base import LoadOptions
from bitllm.backends.reference import ReferenceBackend
from bitllm.errors import UnsupportedModelError
from bitllm.train.model import TernaryDecoder
from synthetic import SWITCHES, tiny_spec
from torch_checkpoint import torch_checkpoint


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing by more threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(spec) -> TernaryDecoder:
    """A model whose vectors (gains, biases) are random too, and whose logits are spread."""
    torch.manual_seed(0)
    model = TernaryDecoder(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.mul_(10)
    return model


@pytest.mark.parametrize("switch", SWITCHES)
def test_logits_are_those_of_the_reference(switch):
    spec = tiny_spec(**SWITCHES[switch])
    model = random_model(spec).eval()
    ids = prompt_ids(40, spec.vocab_size)
    with torch.inference_mode():
        found = model(torch.tensor([ids]))[0].numpy()
    options = LoadOptions(kv_tokens=64, kv_dtype="fp32")
    decoder = ReferenceBackend().load(torch_checkpoint(model), options)
    wanted = logits_of(decoder, ids)
    # Last-bit differences in floating point can move an int8 value by one, further on.
    error = ((found - wanted) ** 2).sum() / (wanted**2).sum()
    assert error <= 1e-4
    assert np.abs(wanted).max() > 0.1


def test_a_later_token_changes_no_earlier_logit():
    model = random_model(tiny_spec())
    ids = torch.tensor([prompt_ids(12, 101)])
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 101
    with torch.inference_mode():
        first, second = model(ids), model(changed)
    assert torch.equal(first[:, :8], second[:, :8])
    assert not torch.equal(first[:, 8:], second[:, 8:])


def test_loss_is_the_cross_entropy_of_the_next_token():
    model = random_model(tiny_spec())
    ids = torch.tensor([prompt_ids(9, 101), prompt_ids(9, 101, seed=1)])
    with torch.inference_mode():
        log_probabilities = model(ids).log_softmax(-1)
        picked = log_probabilities[:, :-1].gather(-1, ids[:, 1:, None])
        torch.testing.assert_close(model.loss(ids), -picked.mean())


def test_every_parameter_gets_a_gradient():
    model = random_model(tiny_spec(**SWITCHES["sub_norms"], qk_norm=True, post_norms=True))
    model.loss(torch.tensor([prompt_ids(30, 101)])).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_pooling_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="pools"):
        TernaryDecoder(dataclasses.replace(tiny_spec(), pooling="last"))
