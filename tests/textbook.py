"""The decoder as a textbook writes it, in float64 and without a cache: an oracle for the reference.

It shares no code with the package: whole attention matrices, ordinary softmax, NumPy's functions.
Activations are not quantised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitllm.checkpoint import Checkpoint, LayerSpec, RopeSpec


def textbook_logits(checkpoint: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    """Logits of every token of one sequence, float64 [tokens, vocab]."""
    spec = checkpoint.spec
    embed = values(checkpoint, "embed")
    h = embed[np.array(ids)] * spec.embedding_scale
    for index, layer in enumerate(spec.layers):
        h = decoder_layer(checkpoint, f"layers.{index}.", layer, h)
    h = normed(checkpoint, "final_norm", h, spec.norm_eps)
    return h @ (embed if spec.tied_head else values(checkpoint, "head")).T


def decoder_layer(
    checkpoint: Checkpoint, prefix: str, layer: LayerSpec, h: np.ndarray
) -> np.ndarray:
    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return normed(checkpoint, prefix + name, x, layer.norm_eps)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return projected(checkpoint, prefix + name, layer.linear(name).norm_eps, x)

    tokens = len(h)
    x = norm("attn_norm", h)
    q, k, v = (linear(name, x).reshape(tokens, -1, layer.head_dim) for name in "qkv")
    q, k = turned(norm("q_norm", q), layer.rope), turned(norm("k_norm", k), layer.rope)
    a = attention(q, k, v, layer).reshape(tokens, -1)
    h = h + norm("post_attn_norm", linear("o", norm("attn_sub_norm", a)))
    x = norm("ffn_norm", h)
    f = activated(layer.activation, linear("gate", x)) * linear("up", x)
    return h + norm("post_ffn_norm", linear("down", norm("ffn_sub_norm", f)))


def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.dense(name).to_float32().astype(np.float64)


def normed(checkpoint: Checkpoint, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm where the architecture has a norm of this name."""
    if checkpoint.spec.dense_shape(name) is None:
        return x
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * values(checkpoint, name)


def projected(
    checkpoint: Checkpoint, name: str, norm_eps: float | None, x: np.ndarray
) -> np.ndarray:
    if norm_eps is not None:
        x = normed(checkpoint, f"{name}.norm", x, norm_eps)
    matrix = checkpoint.ternary(name)
    y = x @ (matrix.codes().astype(np.float64) * np.float64(matrix.scales)).T
    has_bias = checkpoint.spec.dense_shape(f"{name}.bias") is not None
    return y + values(checkpoint, f"{name}.bias") if has_bias else y


def turned(x: np.ndarray, rope: RopeSpec) -> np.ndarray:
    """Rotary embedding as a product of complex numbers: pair (i, i + dim / 2) turns by an angle."""
    frequencies = rope.theta ** (-np.arange(0, rope.dim, 2) / rope.dim)
    if rope.scaling == "linear":
        frequencies = frequencies / rope.factor
    elif rope.scaling == "llama3":
        periods = rope.original_context * frequencies / (2 * np.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        share = np.clip((periods - rope.low_freq_factor) / span, 0, 1)
        frequencies = frequencies * (share + (1 - share) / rope.factor)
    turns = np.exp(1j * np.outer(np.arange(len(x)), frequencies))[:, None]
    half = rope.dim // 2
    pairs = (x[..., :half] + 1j * x[..., half : rope.dim]) * turns
    return np.concatenate([pairs.real, pairs.imag, x[..., rope.dim :]], axis=-1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, layer: LayerSpec) -> np.ndarray:
    """Softmax attention of [tokens, heads, head_dim] with causal mask and sliding window."""
    tokens = len(q)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    seen = (distance >= 0) & (distance < (layer.sliding_window or tokens))
    heads = np.arange(layer.num_heads) * layer.num_kv_heads // layer.num_heads
    scores = np.einsum("thd,shd->hts", q, k[:, heads]) * layer.query_scale
    weights = np.exp(np.where(seen, scores - scores.max(axis=-1, keepdims=True), -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v[:, heads])


def activated(name: str, x: np.ndarray) -> np.ndarray:
    if name == "relu2":
        return np.where(x > 0, x, 0) ** 2
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
