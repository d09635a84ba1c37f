"""One decoder layer in MLX: norms, ternary projections, the attention and feed-forward blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from bitllm.backends.mlx.adapters import Adapted
from bitllm.backends.mlx.attention import Angles, KvCache, StepLayout, attend, rotate
from bitllm.backends.mlx.linear import Linear
from bitllm.backends.mlx.tensors import vector
from bitllm.checkpoint import LINEAR_NAMES, Activation, Checkpoint

__all__ = ["COMPILED_ROWS", "Layer", "gated"]

COMPILED_ROWS = 8
"""Steps of up to so many rows run through `mx.compile`: each number of rows is traced once."""


def compiles() -> bool:
    """Whether steps are compiled: through Metal. On a CPU, MLX would start a C++ compiler."""
    return mx.metal.is_available()


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
        self._prefix = prefix = f"layers.{index}."
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
        # Streams belong to threads: what is left to compute here, no other thread could.
        mx.eval(self._gains, [linear.arrays() for linear in self.linear.values()])
        self._compiled = (mx.compile(self._project), mx.compile(self._finish))

    def __call__(
        self,
        h: mx.array,
        layout: StepLayout,
        angles: Angles,
        cache: KvCache,
        adapted: Sequence[Adapted] = (),
    ) -> mx.array:
        """Return the hidden states after this layer, float32 [tokens, hidden].

        What depends on nothing but its arguments is compiled for steps of few rows: elementwise
        operations become one kernel. The cache stays outside, as a compiled function would copy
        it, and attention too, whose shapes change with the text; so do rows with adapters.
        """
        small = len(h) <= COMPILED_ROWS and not adapted and compiles()
        project, finish = self._compiled if small else (self._project, self._finish)
        rest = () if small else (adapted,)
        q, k, v = project(h, angles.cosine, angles.sine, *rest)
        cache.write(layout.blocks, layout.places, k, v)
        return finish(h, attend(q, layout, cache, self.spec), *rest)

    def _apply(self, name: str, x: mx.array, adapted: Sequence[Adapted]) -> mx.array:
        """Apply the linear called `name` and what adapters add to some rows of it."""
        y = self.linear[name](x)
        for each in adapted:
            y = each.add_to(y, x, self._prefix + name)
        return y

    def _project(
        self, h: mx.array, cosine: mx.array, sine: mx.array, adapted: Sequence[Adapted] = ()
    ) -> tuple[mx.array, mx.array, mx.array]:
        x = self._norm("attn_norm", h)
        q, k, v = (
            self._apply(name, x, adapted).reshape(len(h), -1, self.spec.head_dim)
            for name in ("q", "k", "v")
        )
        angles = Angles(cosine, sine)
        q = rotate(self._norm("q_norm", q), angles)
        return q, rotate(self._norm("k_norm", k), angles), v

    def _finish(self, h: mx.array, attended: mx.array, adapted: Sequence[Adapted] = ()) -> mx.array:
        y = self._apply("o", self._norm("attn_sub_norm", attended), adapted)
        h = h + self._norm("post_attn_norm", y)
        x = self._norm("ffn_norm", h)
        f = gated(self.spec.activation, *(self._apply(name, x, adapted) for name in ("gate", "up")))
        y = self._apply("down", self._norm("ffn_sub_norm", f), adapted)
        return h + self._norm("post_ffn_norm", y)

    def _norm(self, name: str, x: mx.array) -> mx.array:
        """Apply the norm called `name`, or nothing where the layer has none."""
        gain = self._gains.get(name)
        return x if gain is None else mx.fast.rms_norm(x, gain, self.spec.norm_eps)
