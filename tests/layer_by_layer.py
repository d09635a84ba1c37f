"""Teacher forcing: each layer of a decoder is fed what the same layer of a reference was fed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from batches import Run, make_batch
from bitllm.backends import get_backend
from bitllm.backends.base import KV_BLOCK_SIZE, LoadOptions, OutputKind
from bitllm.checkpoint import Checkpoint, DenseTensor, TernaryMatrix


@dataclass(frozen=True)
class OneLayer:
    """The tensors of one layer of a checkpoint, under an embedding that holds its inputs."""

    checkpoint: Checkpoint
    layer: int
    inputs: np.ndarray

    def dense(self, name: str) -> DenseTensor | None:
        if name == "embed":
            return DenseTensor(self.inputs, "f32")
        if name == "final_norm":
            return DenseTensor(np.ones(self.inputs.shape[1], np.float32), "f32")
        return self.checkpoint.source.dense(self._there(name))

    def ternary(self, name: str) -> TernaryMatrix | None:
        return self.checkpoint.source.ternary(self._there(name))

    def _there(self, name: str) -> str:
        return name.replace("layers.0.", f"layers.{self.layer}.")


def layers_in_transformers(model: Any, ids: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Input and output [tokens, hidden] of each layer in transformers, for ids [1, tokens]."""
    seen = []
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, output: seen.append((inputs[0][0].numpy(), output[0].numpy()))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def layer_errors(
    device: str, checkpoint: Checkpoint, layer: int, inputs: np.ndarray, outputs: np.ndarray
) -> np.ndarray:
    """Relative error of one layer's output at each token, after a norm without gain.

    Args:
        device: the decoder.
        checkpoint: the whole model.
        layer: which of its layers.
        inputs: float32 [tokens, hidden] that the reference fed to it.
        outputs: float32 [tokens, hidden] that it gave.
    """
    spec = replace(
        checkpoint.spec,
        layers=(checkpoint.spec.layers[layer],),
        vocab_size=len(inputs),
        tied_head=True,
        embedding_scale=1.0,
    )
    source = OneLayer(checkpoint, layer, np.ascontiguousarray(inputs, np.float32))
    options = LoadOptions(kv_tokens=len(inputs), kv_dtype="fp32", threads=1)
    decoder = get_backend(device).load(Checkpoint(spec, source, "one layer"), options)
    blocks = range(-(-len(inputs) // KV_BLOCK_SIZE))
    batch = make_batch([Run(range(len(inputs)), 0, blocks)], OutputKind.HIDDEN)
    try:
        ours = decoder.forward(batch).hidden.astype(np.float64)
    finally:
        decoder.close()
    wide = outputs.astype(np.float64)
    theirs = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + checkpoint.spec.norm_eps)
    return np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
