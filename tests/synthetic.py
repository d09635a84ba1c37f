"""Random checkpoints in memory, for any architecture: what tests load instead of files.

Every value is an exact function of (seed, tensor name, index) through Philox, so that the same
model comes out on each platform and with each version of NumPy.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitllm.adapter import Adapter, LowRankUpdate
from bitllm.backends.numerics import philox4x32
from bitllm.checkpoint import (
    LINEAR_NAMES,
    Checkpoint,
    DenseTensor,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    RopeSpec,
    TernaryMatrix,
)

SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu_tanh"},
    "sub_norms": {"attn_sub_norm": True, "ffn_sub_norm": True},
    "no_block_norms": {"attn_norm": False, "ffn_norm": False, "linear_norm_eps": 1e-6},
    "linear_norms": {"linear_norm_eps": 1e-6},
    "qk_norm": {"qk_norm": True},
    "post_norms": {"post_norms": True},
    "biases": {"bias": True},
    "sliding_window": {"sliding_window": 7},
    "wide_window": {"sliding_window": 40},
    "float_activations": {"activation_bits": None},
    "float_activations_biased": {"activation_bits": None, "bias": True, "linear_norm_eps": 1e-6},
    "one_kv_head": {"num_kv_heads": 1},
    "all_kv_heads": {"num_kv_heads": 4},
    "partial_rope": {"rope_dim": 6},
    "linear_rope": {"rope_scaling": "linear", "rope_factor": 4.0},
    "llama3_rope": {"rope_scaling": "llama3", "rope_factor": 8.0, "original_context": 64},
    "query_scale": {"query_scale": 0.5},
    "tied_head": {"tied_head": True},
    "embedding_scale": {"embedding_scale": 6.0},
    "wide_heads": {"head_dim": 34},
    "row_sized": {"hidden_size": 300, "ffn_size": 517},
}
"""A name and arguments of `tiny_spec` for every switch of the architecture."""


def tiny_spec(
    *,
    num_layers: int = 2,
    vocab_size: int = 101,
    hidden_size: int = 44,
    ffn_size: int = 70,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 10,
    rope_dim: int | None = None,
    rope_theta: float = 10000.0,
    rope_scaling: str = "none",
    rope_factor: float = 1.0,
    original_context: int = 8192,
    linear_norm_eps: float | None = None,
    bias: bool = False,
    activation_bits: int | None = 8,
    activation: str = "relu2",
    norm_eps: float = 1e-5,
    query_scale: float | None = None,
    tied_head: bool = False,
    max_context: int = 256,
    embedding_scale: float = 1.0,
    **layer_switches: Any,
) -> ModelSpec:
    """A small architecture whose sizes are no multiple of anything; other switches: `LayerSpec`."""
    attention = num_heads * head_dim
    shapes = {
        "q": (attention, hidden_size),
        "k": (num_kv_heads * head_dim, hidden_size),
        "v": (num_kv_heads * head_dim, hidden_size),
        "o": (hidden_size, attention),
        "gate": (ffn_size, hidden_size),
        "up": (ffn_size, hidden_size),
        "down": (hidden_size, ffn_size),
    }
    layer = LayerSpec(
        **{
            name: LinearSpec(*shapes[name], linear_norm_eps, bias, activation_bits)
            for name in LINEAR_NAMES
        },
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=RopeSpec(
            rope_theta,
            rope_dim or head_dim,
            rope_scaling,
            rope_factor,
            original_context=original_context,
        ),
        activation=activation,
        norm_eps=norm_eps,
        query_scale=head_dim**-0.5 if query_scale is None else query_scale,
        **layer_switches,
    )
    return ModelSpec(
        architecture="synthetic",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(layer,) * num_layers,
        norm_eps=norm_eps,
        tied_head=tied_head,
        max_context=max_context,
        embedding_scale=embedding_scale,
    )


def random_words(seed: int, name: str, count: int) -> np.ndarray:
    """`count` uniform uint32 that belong to `name`."""
    index = np.arange(-(-count // 4), dtype=np.uint32)
    stream = np.full_like(index, zlib.crc32(name.encode()))
    zero = np.zeros_like(index)
    words = philox4x32((index, stream, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(words, axis=1).ravel()[:count]


def random_uniform(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 [shape] in [-1, 1), multiples of 2**-23."""
    words = random_words(seed, name, int(np.prod(shape)))
    centred = (words >> np.uint32(8)).astype(np.int32) - (1 << 23)
    return np.ldexp(centred.astype(np.float32), -23).reshape(shape)


def random_codes(seed: int, name: str, shape: tuple[int, int]) -> np.ndarray:
    """int8 [shape] of -1, 0, +1, equally often."""
    words = random_words(seed, name, shape[0] * shape[1])
    return ((words % 3).astype(np.int8) - np.int8(1)).reshape(shape)


def dense_tensor(values: np.ndarray, dtype: str) -> DenseTensor:
    """Round float32 values to f32, f16 or bf16 (half to even)."""
    if dtype == "bf16":
        bits = values.view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> 16
        return DenseTensor(bits.astype(np.uint16), "bf16")
    return DenseTensor(values.astype(np.float16 if dtype == "f16" else np.float32), dtype)


@dataclass(frozen=True)
class MemorySource:
    """A `TensorSource` of two dictionaries; tests may take tensors out or change them."""

    dense_tensors: dict[str, DenseTensor]
    ternary_matrices: dict[str, TernaryMatrix]

    def dense(self, name: str) -> DenseTensor | None:
        return self.dense_tensors.get(name)

    def ternary(self, name: str) -> TernaryMatrix | None:
        return self.ternary_matrices.get(name)


def random_checkpoint(
    spec: ModelSpec,
    seed: int = 0,
    *,
    dtype: str = "bf16",
    granularity: str = "tensor",
    group_size: int | None = None,
    magnitude: float = 1.0,
    zero_rows: float = 0.0,
) -> Checkpoint:
    """A checkpoint of random values of sensible size: logits spread over a few units.

    `dtype` is that of the embedding and the head; `granularity` says what shares a weight scale,
    and `magnitude` multiplies all of those. `zero_rows` is the share of rows of ternary matrices
    that are all zero.
    """
    dense = {}
    for name, shape in spec.dense_shapes().items():
        values = random_uniform(seed, name, shape)
        if name in ("embed", "head"):
            dense[name] = dense_tensor(values, dtype)
        else:
            offset = 0.0 if name.endswith(".bias") else 1.0
            dense[name] = dense_tensor(np.float32(offset) + np.float32(0.25) * values, "f32")
    ternary = {}
    for name, linear in spec.linear_names():
        codes = random_codes(seed, name, (linear.out_features, linear.in_features))
        drawn = random_uniform(seed, name + ".zero_rows", (linear.out_features,))
        codes[drawn < 2 * zero_rows - 1] = 0
        groups = () if group_size is None else (-(-linear.in_features // group_size),)
        shape = () if granularity == "tensor" else (linear.out_features, *groups)
        spread = random_uniform(seed, name + ".scales", shape or (1,)).reshape(shape)
        scales = (np.float32(1.0) + np.float32(0.5) * spread) / np.float32(linear.in_features**0.5)
        scales = scales * np.float32(magnitude)
        ternary[name] = TernaryMatrix.from_codes(codes, np.asarray(scales), group_size)
    return Checkpoint(spec, MemorySource(dense, ternary), "synthetic model")


def random_adapter(
    spec: ModelSpec,
    seed: int = 0,
    *,
    rank: int = 5,
    dtype: str = "f32",
    linears: Collection[str] = LINEAR_NAMES,
    layers: Collection[int] | None = None,
    scale: float = 0.75,
) -> Adapter:
    """An adapter whose sums are of the size of the products that they are added to."""
    updates = {}
    for name, linear in spec.linear_names():
        _, layer, which = name.split(".")
        if which not in linears or (layers is not None and int(layer) not in layers):
            continue
        a = random_uniform(seed, name + ".a", (rank, linear.in_features))
        b = random_uniform(seed, name + ".b", (linear.out_features, rank))
        a, b = (each / np.float32(each.shape[1] ** 0.5) for each in (a, b))
        updates[name] = LowRankUpdate(dense_tensor(a, dtype), dense_tensor(b, dtype), scale)
    return Adapter(f"adapter of seed {seed}", updates)
