"""The trained layer: the quantisation of `bitllm.ternary`, straight-through gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitllm import ternary
from bitllm.train.bitlinear import BitLinear, quantize_activations, quantize_weights

SHAPES = [(1, 1), (3, 5), (17, 63), (64, 256), (97, 130)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing by more threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_matrix(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("spread", [1e-7, 0.02, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_codes_are_those_of_the_number_format(shape, spread):
    weight = random_matrix(shape, seed=1, spread=spread)
    codes, scale = quantize_weights(weight)
    wanted_codes, wanted_scale = ternary.quantize_weights(weight.numpy())
    assert (codes.numpy().astype(np.int8) == wanted_codes).all()
    assert scale.item() == torch.tensor(float(wanted_scale)).bfloat16().item()


@pytest.mark.parametrize("spread", [1e-7, 1.0, 1e6])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_those_of_the_number_format(shape, spread):
    x = random_matrix(shape, seed=2, spread=spread)
    q, a = quantize_activations(x)
    wanted_q, wanted_a = ternary.quantize_activations(x.numpy())
    assert (q.numpy().astype(np.int8) == wanted_q).all()
    assert (a[:, 0].numpy() == wanted_a).all()


def test_halves_round_to_even():
    q, _ = quantize_activations(torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5]]))
    assert q.tolist() == [[127.0, 0.0, 2.0, -0.0, -2.0]]


@pytest.mark.parametrize("training", [True, False])
def test_the_forward_pass_is_the_integer_product(training):
    layer = BitLinear(130, 33, bias=True).train(training)
    x = random_matrix((2, 7, 130), seed=3)
    codes, scale = quantize_weights(layer.weight.detach())
    q, a = ternary.quantize_activations(x.numpy())
    accumulated = ternary.matmul_int32(codes.numpy().astype(np.int8), q).astype(np.float32)
    wanted = accumulated / a[..., None] * np.float32(scale.item()) + layer.bias.detach().numpy()
    assert (layer(x).detach().numpy() == wanted).all()


@pytest.mark.parametrize("activation_bits", [8, None])
def test_gradients_follow_the_straight_through_rule(activation_bits):
    """dL/dx = g W', dL/dW = g^T x', dL/db = sum g, at the rounded weights W' and inputs x'."""
    layer = BitLinear(19, 11, activation_bits=activation_bits)
    x = random_matrix((4, 5, 19), seed=4).requires_grad_()
    upstream = random_matrix((4, 5, 11), seed=5)
    layer(x).backward(upstream)
    codes, scale = quantize_weights(layer.weight.detach())
    q, a = quantize_activations(x.detach())
    rounded = x.detach() if activation_bits is None else q / a
    rows, inputs = upstream.reshape(-1, 11).double(), rounded.reshape(-1, 19).double()
    weights = (codes * scale).double()
    torch.testing.assert_close(
        x.grad.double(), (rows @ weights).reshape(4, 5, 19), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(layer.weight.grad.double(), rows.T @ inputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad.double(), rows.sum(0), rtol=1e-5, atol=1e-6)


def test_gradients_reach_weights_that_round_to_zero():
    layer = BitLinear(8, 4, bias=False)
    with torch.no_grad():
        layer.weight[:, 1:] = 1e-6
        layer.weight[:, 0] = 1.0
    codes, _ = quantize_weights(layer.weight.detach())
    assert (codes[:, 1:] == 0).all()
    layer(torch.ones(1, 8)).sum().backward()
    assert (layer.weight.grad != 0).all()


def test_without_activation_rounding_the_input_passes_whole():
    layer = BitLinear(6, 2, bias=False, activation_bits=None)
    x = random_matrix((3, 6), seed=6)
    codes, scale = quantize_weights(layer.weight.detach())
    torch.testing.assert_close(layer(x).detach(), x @ (codes * scale).T)


def test_it_is_a_linear_layer_to_everyone_else():
    layer = BitLinear(6, 2)
    assert isinstance(layer, torch.nn.Linear)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_low_precision_inputs_come_back_in_their_own_dtype():
    layer = BitLinear(16, 4, bias=False, dtype=torch.bfloat16)
    x = random_matrix((2, 16), seed=7).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (torch.bfloat16,) * 3
