"""The trained layer: the quantisation of `bitllm.ternary`, straight-through gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bitllm import ternary
from bitllm.errors import ConfigError
from bitllm.train.bitlinear import BitLinear
from bitllm.train.quantizers import quantize_activations, quantize_weights

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


BITS = ["1", "1.58", "2", "4", "8"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", ["1", "4", "8"])
def test_levels_for_study_are_those_of_the_number_format(bits, shape):
    weight = random_matrix(shape, seed=8)
    levels, scale = quantize_weights(weight, bits)
    wanted, wanted_scale = ternary.round_to_baseline(weight.numpy(), bits)
    assert (levels.numpy().astype(np.int8) == wanted).all()
    assert scale.item() == torch.tensor(float(wanted_scale)).bfloat16().item()


def test_two_bits_are_four_levels_and_better_than_three():
    weight = random_matrix((200, 200), seed=9)
    levels, scale = quantize_weights(weight, "2")
    assert sorted(set(levels.flatten().tolist())) == [-1.5, -0.5, 0.5, 1.5]
    # Max (1960): the mean squared error of four equal steps is 0.1188 for a normal distribution.
    assert (levels * scale - weight).square().mean().item() == pytest.approx(0.1188, rel=0.02)


def written_out(layer, x, strength):
    """The layer in plain autograd, in float64: w + s (w' - w).detach(), and x alike."""
    levels, scale = quantize_weights(layer.weight.detach(), layer.weight_bits)
    q, a = quantize_activations(x.detach())
    x, weight = x.double(), layer.weight.double()
    rounded = q.double() / a.double()
    x = x + strength * (rounded - x).detach()
    weight = weight + strength * ((levels * scale).double() - weight).detach()
    return x @ weight.T + layer.bias.double()


@pytest.mark.parametrize("strength", [None, 0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("bits", BITS)
def test_outputs_and_gradients_are_those_written_out(bits, strength):
    layer = BitLinear(63, 17, weight_bits=bits, strength=strength)
    x = random_matrix((4, 5, 63), seed=10).requires_grad_()
    upstream = random_matrix((4, 5, 17), seed=11)
    parameters = x, layer.weight, layer.bias
    wanted = written_out(layer, x, 1.0 if strength is None else strength)
    found = layer(x)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(wanted, parameters, upstream.double())
    found = torch.autograd.grad(found, parameters, upstream)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_both_ends_of_the_strength_are_exact(bits, dtype):
    blended = BitLinear(130, 33, bias=False, weight_bits=bits, strength=0.0, dtype=dtype)
    whole = BitLinear(130, 33, bias=False, weight_bits=bits, dtype=dtype)
    dense = torch.nn.Linear(130, 33, bias=False, dtype=dtype)
    whole.weight = dense.weight = blended.weight
    x = random_matrix((7, 130), seed=12).to(dtype).requires_grad_()
    upstream = random_matrix((7, 33), seed=13).to(dtype)
    for strength, like in (0.0, dense), (1.0, whole):
        blended.set_strength(strength)
        found, wanted = blended(x), like(x)
        assert torch.equal(found, wanted), strength
        weights = x, blended.weight
        found, wanted = (torch.autograd.grad(y, weights, upstream) for y in (found, wanted))
        assert all(map(torch.equal, found, wanted)), strength


def saved_bytes(layer, x):
    """Bytes that the forward pass keeps for the backward pass, parameters not counted."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_byte_an_activation_is_kept_for_the_backward_pass(dtype):
    tokens, width = 24, 640
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    dense = saved_bytes(torch.nn.Linear(width, 320, dtype=dtype), x)
    assert dense == tokens * width * dtype.itemsize
    quantized = saved_bytes(BitLinear(width, 320, dtype=dtype), x)
    assert quantized == tokens * width + (tokens + 1) * 4  # and scales: one a token, one more
    on_the_way = saved_bytes(BitLinear(width, 320, dtype=dtype, strength=0.5), x)
    assert on_the_way == dense + 4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("strength", [None, 0.0, 0.5, 1.0])
def test_zeros_give_finite_values_and_gradients(bits, strength):
    layer = BitLinear(16, 4, weight_bits=bits, strength=strength, norm_eps=1e-6)
    with torch.no_grad():
        layer.weight.zero_()
    x = torch.zeros(3, 16, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in x.grad, *(parameter.grad for parameter in layer.parameters()):
        assert tensor.isfinite().all()


def test_any_number_of_tokens_and_of_axes():
    layer = BitLinear(6, 4)
    for shape in [(6,), (0, 6), (2, 0, 6), (2, 3, 1, 6)]:
        x = torch.ones(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (*shape[:-1], 4)
        assert x.grad.shape == x.shape


def test_the_norm_comes_before_the_rounding():
    layer = BitLinear(32, 5, bias=False, norm_eps=1e-5)
    plain = BitLinear(32, 5, bias=False)
    with torch.no_grad():
        layer.rms_norm.weight.uniform_(0.5, 2.0)
    plain.weight = layer.weight
    x = random_matrix((3, 32), seed=14, spread=50.0)
    normed = torch.nn.functional.rms_norm(x, (32,), layer.rms_norm.weight, 1e-5)
    assert torch.equal(layer(x), plain(normed))
    layer(x).square().sum().backward()
    assert (layer.rms_norm.weight.grad != 0).all()


def test_autocast_computes_in_its_own_dtype():
    layer = BitLinear(64, 8)
    x = random_matrix((3, 64), seed=15).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": "3"}, "weight_bits must be one of '1', '1.58', .*got '3'"),
        ({"weight_bits": 2}, "weight_bits must be one of"),
        ({"activation_bits": 4}, "activation_bits must be 8 or None, got 4"),
        ({"strength": 1.5}, r"strength must lie in 0 \.\. 1, got 1.5"),
        ({"strength": float("nan")}, "strength must lie in"),
    ],
)
def test_what_is_not_offered_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BitLinear(4, 4, **options)
    linear = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=message):
        BitLinear.adopt(linear, **options)
    assert type(linear) is torch.nn.Linear


def test_a_layer_without_a_strength_cannot_change_it():
    with pytest.raises(ConfigError, match="always quantised"):
        BitLinear(4, 4).set_strength(0.5)


# Dynamo itself makes an instance of the class of autograd functions.
of_dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@of_dynamo
@pytest.mark.parametrize("bits", BITS)
def test_it_compiles_without_graph_breaks_or_recompilation(bits):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = BitLinear(32, 8, weight_bits=bits, strength=0.0, norm_eps=1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = random_matrix((5, 32), seed=16).requires_grad_()
    for strength in (0.0, 0.25, 0.7, 1.0):
        layer.set_strength(strength)
        found = torch.autograd.grad(compiled(x).square().sum(), (x, *layer.parameters()))
        wanted = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
        for left, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(left, right)
    assert counter.frame_count == 1


@of_dynamo
def test_it_compiles_without_a_strength_too():
    torch.compiler.reset()
    layer = BitLinear(32, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = random_matrix((5, 32), seed=17)
    assert torch.equal(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))


def test_a_layer_learns_what_a_ternary_teacher_computes_exactly():
    generator = torch.Generator().manual_seed(18)
    teacher, layer = BitLinear(24, 12, bias=False), BitLinear(24, 12, bias=False)
    codes = torch.randint(-1, 2, (12, 24), generator=generator).float()
    with torch.no_grad():
        teacher.weight.copy_(codes)
        layer.weight.copy_(random_matrix((12, 24), seed=19))
    optimizer = torch.optim.Adam(layer.parameters())
    steps = 1500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        x = torch.randn(64, 24, generator=generator)
        loss = (layer(x) - teacher(x).detach()).square().mean()
        if loss.item() == 0:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == 0
    assert torch.equal(quantize_weights(layer.weight.detach())[0], codes)
