"""Evidence at real size, by `make verify-large`: a random model of the exact 2B-4T shape."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from batches import logits_of, prompt_ids
from bitllm import _native, ops
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.bench.random_model import SHAPES, write_checkpoint
from bitllm.formats import open_checkpoint
from layer_by_layer import layer_errors, layers_in_transformers

# Run what transformers compiles as it is written.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch, "compile", lambda function: function)
    from transformers.integrations import bitnet as hf

pytestmark = pytest.mark.large

MODEL = Path(os.environ.get("BITLLM_LARGE_MODEL", "build/models/2b"))


@pytest.fixture(scope="module")
def directory() -> Path:
    if not (MODEL / "model.safetensors").exists():
        write_checkpoint(MODEL, SHAPES["2b"])
    return MODEL


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return prompt_ids(40, SHAPES["2b"].vocab, seed=7)


def native_logits(
    directory: Path, prompt: list[int], cuts: tuple[int, ...] = (), **options: object
) -> np.ndarray:
    decoder = get_backend("cpu").load(
        open_checkpoint(directory), LoadOptions(kv_tokens=64, **options)
    )
    try:
        return logits_of(decoder, prompt, cuts)
    finally:
        decoder.close()


def test_kernels_threads_and_pieces_change_no_bit(directory: Path, prompt: list[int]) -> None:
    expected = native_logits(directory, prompt, threads=2)
    assert np.isfinite(expected).all()
    assert expected.std() > 0.1
    for isa in _native.kernel_names():
        pieces = native_logits(directory, prompt, (1, 2, 33), threads=1, isa=isa)
        assert (pieces.view(np.uint32) == expected.view(np.uint32)).all(), isa


def nmse(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Squared error over squared size."""
    return float(((ours - theirs) ** 2).sum() / (theirs**2).sum())


def test_against_transformers(directory: Path, prompt: list[int]) -> None:
    """The same files in transformers, in bfloat16 as published and in float32; takes 15 GB.

    Thirty layers of random weights amplify each flipped int8 code, so the whole model is held to
    the noise of transformers' own bfloat16; its parts, each on the same input, are held to more.
    """
    ids = torch.tensor([prompt])
    model = transformers.BitNetForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        stock = model(ids).logits[0].float().numpy()
        # transformers forbids its own .float() on quantised models.
        exact = torch.nn.Module.float(model)(ids).logits[0].numpy()
    ours = native_logits(directory, prompt, kv_dtype="fp32")
    noise, error = nmse(stock, exact), nmse(ours, exact)
    agree = float((ours.argmax(-1) == exact.argmax(-1)).mean())
    print(f"NMSE {error:.1e}, of bfloat16 {noise:.1e}; greedy tokens agree at {agree:.1%}")
    assert error <= noise
    assert_layers_and_projections_agree(model, ids, open_checkpoint(directory))


def assert_layers_and_projections_agree(model: Any, ids: torch.Tensor, checkpoint: Any) -> None:
    """Layers and projections, each on the input that it had in transformers.

    A flipped int8 code reaches all later tokens through attention. So most layers have a token
    that shows nothing but rounding errors, and no token of any shows more than such codes do.
    """
    names = {name: f"self_attn.{name}_proj" for name in "qkvo"}
    names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    modules: dict[str, Any] = {}
    for index, layer in enumerate(model.model.layers):
        for short, path in names.items():
            name, module = f"layers.{index}.{short}", layer.get_submodule(path)
            modules[name] = module
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.update(
                    {name: (inputs[0][0].numpy(), output[0].numpy())}
                )
            )
    layers = layers_in_transformers(model, ids)
    flipped = 0
    for name, (inputs, output) in seen.items():
        matrix = checkpoint.ternary(name)
        q, a = ops.quantize_activations(inputs)
        theirs = (hf.ActQuant.apply(torch.from_numpy(inputs)).numpy() * a[:, None]).round()
        flips = int((q != theirs).sum())
        assert abs(q - theirs).max() <= 1, name
        assert flips <= 1e-3 * q.size, name
        flipped += flips
        weights = modules[name].weight.detach().double().numpy()
        accumulators = ops.ternary_matmul(matrix.packed, q)
        assert (accumulators == q.astype(np.float64) @ weights.T).all(), name
        ours = accumulators / a[:, None] * matrix.scales
        assert nmse(ours, output) <= (1e-11 if flips == 0 else 1e-5), name
    print(f"{len(seen)} projections: accumulators equal; {flipped} int8 codes off by one")
    best = []
    for index, (inputs, outputs) in enumerate(layers):
        errors = layer_errors("cpu", checkpoint, index, inputs, outputs)
        print(f"layer {index}: best {errors.min():.1e}, worst {errors.max():.1e}")
        best.append(errors.min())
        assert errors.max() <= 0.1, index
    assert np.median(best) <= 1e-6
