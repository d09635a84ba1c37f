"""One decoder layer in MLX: norms, ternary projections, the attention and feed-forward blocks."""

from __future__ import annotations

import math

import mlx.core as mx

from bitllm.backends.mlx.attention import Angles, KvCache, StepLayout, attend, rotate
from bitllm.backends.mlx.linear import Linear
from bitllm.backends.mlx.tensors import vector
from bitllm.checkpoint import LINEAR_NAMES, Activation, Checkpoint

__all__ = ["Layer", "gated"]


def gated(activation: Activation, gate: mx.array, up: mx.array) -> mx.array:
    """act(gate) * up, elementwise, in float32: the square of a ReLU overflows float16."""
    if activation == "relu2":
        positive = mx.maximum(gate, 0.0)
        return positive * positive * up
    if activation == "silu":
        return gate * mx.sigmoid(gate) * up
    u = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
    return 0.5 * gate * (1.0 + mx.tanh(u)) * up


class Layer:
    """The weights of one decoder layer and the computation of its two blocks.

    Attributes:
        spec: its switches.
        nbytes: bytes of its matrices.
    """

    def __init__(self, checkpoint: Checkpoint, index: int) -> None:
        self.spec = spec = checkpoint.spec.layers[index]
        prefix = f"layers.{index}."
        self.linear: dict[str, Linear] = {}
        for name in LINEAR_NAMES:
            self.linear[name] = Linear(checkpoint, prefix + name, spec.linear(name))
            checkpoint.release()
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
        self._gains = {name: vector(checkpoint, prefix + name) for name in present if present[name]}
        self.nbytes = sum(linear.nbytes for linear in self.linear.values())

    def __call__(self, h: mx.array, layout: StepLayout, angles: Angles, cache: KvCache) -> mx.array:
        """Return the hidden states after this layer, float32 [tokens, hidden]."""
        q, k, v = self._project(h, angles)
        cache.write(layout.blocks, layout.places, k, v)
        return self._finish(h, attend(q, layout, cache, self.spec))

    def _project(self, h: mx.array, angles: Angles) -> tuple[mx.array, mx.array, mx.array]:
        x = self._norm("attn_norm", h)
        q, k, v = (
            self.linear[name](x).reshape(len(h), -1, self.spec.head_dim) for name in ("q", "k", "v")
        )
        q = rotate(self._norm("q_norm", q), angles)
        return q, rotate(self._norm("k_norm", k), angles), v

    def _finish(self, h: mx.array, attended: mx.array) -> mx.array:
        y = self.linear["o"](self._norm("attn_sub_norm", attended))
        h = h + self._norm("post_attn_norm", y)
        x = self._norm("ffn_norm", h)
        f = gated(self.spec.activation, self.linear["gate"](x), self.linear["up"](x))
        y = self.linear["down"](self._norm("ffn_sub_norm", f))
        return h + self._norm("post_ffn_norm", y)

    def _norm(self, name: str, x: mx.array) -> mx.array:
        """Apply the norm called `name`, or nothing where the layer has none."""
        gain = self._gains.get(name)
        return x if gain is None else mx.fast.rms_norm(x, gain, self.spec.norm_eps)
