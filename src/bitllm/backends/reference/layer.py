"""One decoder layer: norms, ternary projections, the attention block and the feed-forward block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from bitllm.adapter import Adapter, LowRankUpdate
from bitllm.backends.base import KV_BLOCK_SIZE, Batch
from bitllm.backends.numerics import exp_f32, lane_sum, ordered_sum
from bitllm.backends.reference.attention import KvCache, attend, rotate
from bitllm.checkpoint import LINEAR_NAMES, Activation, Checkpoint, LinearSpec
from bitllm.errors import QuantizationError
from bitllm.ternary import matmul_int32, quantize_activations

__all__ = ["AdaptedRows", "Layer", "Linear", "gated", "low_rank", "rms_norm"]

F32 = npt.NDArray[np.float32]
AdaptedRows = tuple[slice, Adapter]
"""Token rows of a run, and the adapter that it asked for."""


def rms_norm(x: F32, gain: F32, eps: float) -> F32:
    """Root-mean-square norm of the last axis: (x * (1 / sqrt(mean(x * x) + eps))) * gain."""
    mean = lane_sum(x * x) / np.float32(x.shape[-1])
    inverse = np.asarray(np.float32(1.0) / np.sqrt(mean + np.float32(eps)))
    y: F32 = (x * inverse[..., None]) * gain
    return y


def gated(activation: Activation, gate: F32, up: F32) -> F32:
    """act(gate) * up, elementwise."""
    one, two = np.float32(1.0), np.float32(2.0)
    if activation == "relu2":
        positive = np.maximum(gate, np.float32(0.0))
        return (positive * positive) * up
    if activation == "silu":
        return (gate / (one + exp_f32(-gate))) * up
    cubic = np.float32(0.044715) * ((gate * gate) * gate)
    u = np.float32(0.7978845608) * (gate + cubic)  # sqrt(2 / pi)
    tanh = one - two / (exp_f32(two * u) + one)
    return ((np.float32(0.5) * gate) * (one + tanh)) * up


def low_rank(x: F32, update: LowRankUpdate) -> F32:
    """(B (A x)) * scale of float32 [tokens, in], as [tokens, out].

    A x is a lane_sum for each of its rows; B times that adds one column after another, so that
    rows of B may be computed side by side.
    """
    a, b = update.a.to_float32(), update.b.to_float32()
    sums = [ordered_sum(lane_sum(a * row) * b, axis=1) for row in x]
    added: F32 = np.stack(sums) * np.float32(update.scale)
    return added


class Linear:
    """One ternary projection with its own norm and bias where the architecture has them."""

    def __init__(self, checkpoint: Checkpoint, name: str, spec: LinearSpec) -> None:
        self.spec = spec
        matrix = checkpoint.ternary(name)
        self.codes = matrix.codes()
        self.scales, self.group_size = matrix.scales, matrix.group_size
        self.norm = _vector(checkpoint, f"{name}.norm", spec.norm_eps is not None)
        self.bias = _vector(checkpoint, f"{name}.bias", spec.bias)

    def __call__(self, x: F32, updates: Iterable[tuple[slice, LowRankUpdate]] = ()) -> F32:
        """Project float32 [tokens, in] to [tokens, out]; some rows with what adapters add."""
        y = self._base(x)
        for rows, update in updates:
            y[rows] = y[rows] + low_rank(x[rows], update)
        return y

    def _base(self, x: F32) -> F32:
        if self.norm is not None and self.spec.norm_eps is not None:
            x = rms_norm(x, self.norm, self.spec.norm_eps)
        y = self._float_product(x) if self.spec.activation_bits is None else self._product(x)
        return y if self.bias is None else y + self.bias

    def _product(self, x: F32) -> F32:
        """(codes @ q / a) * scale; with group scales the groups' products are added in order."""
        q, a = quantize_activations(x)
        if self.group_size is None:
            accumulators = matmul_int32(self.codes, q).astype(np.float32)
            return (accumulators / a[:, None]) * self.scales
        y = np.zeros((len(x), self.spec.out_features), np.float32)
        for group, columns in self._groups(self.group_size):
            accumulators = matmul_int32(self.codes[:, columns], q[:, columns]).astype(np.float32)
            y = y + (accumulators / a[:, None]) * self.scales[:, group]
        return y

    def _float_product(self, x: F32) -> F32:
        """0 + lane_sum(codes * x) * scale of each group in order; a row with one scale is one."""
        if not np.isfinite(x).all():
            raise QuantizationError(
                "activations hold NaN or infinity: "
                "only finite numbers can be multiplied with weights"
            )
        y = np.zeros((len(x), self.spec.out_features), np.float32)
        width = self.group_size or self.spec.in_features
        scales = self.scales if self.group_size else self.scales.reshape(-1, 1)
        for token, row in enumerate(x):
            for group, columns in self._groups(width):
                sums = lane_sum(self.codes[:, columns] * row[columns])
                y[token] = y[token] + sums * scales[:, group]
        return y

    def _groups(self, size: int) -> list[tuple[int, slice]]:
        starts = range(0, self.spec.in_features, size)
        return [(group, slice(start, start + size)) for group, start in enumerate(starts)]


class Layer:
    """The weights of one decoder layer and the computation of its two blocks."""

    def __init__(self, checkpoint: Checkpoint, index: int) -> None:
        self.spec = spec = checkpoint.spec.layers[index]
        self._prefix = prefix = f"layers.{index}."
        self.linear = {
            name: Linear(checkpoint, prefix + name, spec.linear(name)) for name in LINEAR_NAMES
        }
        present = {
            "attn_norm": spec.attn_norm,
            "ffn_norm": spec.ffn_norm,
            "attn_sub_norm": spec.attn_sub_norm,
            "ffn_sub_norm": spec.ffn_sub_norm,
            "q_norm": spec.qk_norm,
            "k_norm": spec.qk_norm,
            "post_attn_norm": spec.post_norms,
            "post_ffn_norm": spec.post_norms,
        }
        self.gains = {name: _vector(checkpoint, prefix + name, present[name]) for name in present}

    def norm(self, name: str, x: F32) -> F32:
        """Apply the norm called `name`, or nothing where the layer has none."""
        gain = self.gains[name]
        return x if gain is None else rms_norm(x, gain, self.spec.norm_eps)

    def project(self, name: str, x: F32, adapted: Sequence[AdaptedRows]) -> F32:
        """Apply the linear called `name` and what adapters add to it."""
        found = [(rows, adapter.updates.get(self._prefix + name)) for rows, adapter in adapted]
        updates = [(rows, update) for rows, update in found if update is not None]
        return self.linear[name](x, updates)

    def attention_block(
        self, h: F32, batch: Batch, cache: KvCache, adapted: Sequence[AdaptedRows] = ()
    ) -> F32:
        """What attention adds to the hidden states, float32 [tokens, hidden]."""
        spec, tokens = self.spec, len(h)
        x = self.norm("attn_norm", h)
        q, k, v = (
            self.project(name, x, adapted).reshape(tokens, -1, spec.head_dim)
            for name in ("q", "k", "v")
        )
        q = rotate(self.norm("q_norm", q), batch.positions, spec.rope)
        k = rotate(self.norm("k_norm", k), batch.positions, spec.rope)
        tables = np.repeat(batch.block_tables, np.diff(batch.run_offsets), axis=0)
        blocks = tables[np.arange(tokens), batch.positions // KV_BLOCK_SIZE]
        cache.write(blocks, batch.positions % KV_BLOCK_SIZE, k, v)
        heads = [
            attend(q[token], int(batch.positions[token]), tables[token], cache, spec)
            for token in range(tokens)
        ]
        attended = np.stack(heads).reshape(tokens, -1)
        y = self.project("o", self.norm("attn_sub_norm", attended), adapted)
        return self.norm("post_attn_norm", y)

    def ffn_block(self, h: F32, adapted: Sequence[AdaptedRows] = ()) -> F32:
        """What the feed-forward network adds to the hidden states, float32 [tokens, hidden]."""
        x = self.norm("ffn_norm", h)
        gate, up = (self.project(name, x, adapted) for name in ("gate", "up"))
        f = gated(self.spec.activation, gate, up)
        y = self.project("down", self.norm("ffn_sub_norm", f), adapted)
        return self.norm("post_ffn_norm", y)


def _vector(checkpoint: Checkpoint, name: str, present: bool) -> F32 | None:
    return checkpoint.dense(name).to_float32() if present else None
