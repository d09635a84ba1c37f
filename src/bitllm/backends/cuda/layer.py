"""One decoder layer in PyTorch: norms, ternary projections, the attention and the FFN block."""

from __future__ import annotations

import math

import torch

from bitllm.backends.cuda.attention import Angles, KvCache, StepLayout, attend, rotate
from bitllm.backends.cuda.linear import Linear, rms_norm
from bitllm.backends.cuda.tensors import vector
from bitllm.checkpoint import LINEAR_NAMES, Activation, Checkpoint

__all__ = ["Layer", "gated", "layer_gains"]


def gated(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """act(gate) * up, elementwise, in float32: the square of a ReLU overflows float16."""
    if activation == "relu2":
        return gate.clamp(min=0.0).square() * up
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    u = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate.pow(3))
    return 0.5 * gate * (1.0 + torch.tanh(u)) * up


def layer_gains(
    checkpoint: Checkpoint, index: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the gains of the norms that a layer has, by their names."""
    spec, prefix = checkpoint.spec.layers[index], f"layers.{index}."
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
    return {name: vector(checkpoint, prefix + name, device) for name in present if present[name]}


class Layer:
    """The weights of one decoder layer and the computation of its two blocks.

    Attributes:
        spec: its switches.
        nbytes: bytes of its matrices.
    """

    def __init__(self, checkpoint: Checkpoint, index: int, device: torch.device) -> None:
        self.spec = spec = checkpoint.spec.layers[index]
        prefix = f"layers.{index}."
        self.linear: dict[str, Linear] = {}
        for name in LINEAR_NAMES:
            self.linear[name] = Linear(checkpoint, prefix + name, spec.linear(name), device)
            checkpoint.release()
        self._gains = layer_gains(checkpoint, index, device)
        self.nbytes = sum(linear.nbytes for linear in self.linear.values())

    def __call__(
        self, h: torch.Tensor, layout: StepLayout, angles: Angles, cache: KvCache
    ) -> torch.Tensor:
        """Return the hidden states after this layer, float32 [tokens, hidden]."""
        x = self._norm("attn_norm", h)
        q, k, v = (
            self.linear[name](x).view(len(h), -1, self.spec.head_dim) for name in ("q", "k", "v")
        )
        q, k = rotate(self._norm("q_norm", q), angles), rotate(self._norm("k_norm", k), angles)
        cache.write(layout.slots, k, v)
        attended = attend(q, layout, cache, self.spec)
        y = self.linear["o"](self._norm("attn_sub_norm", attended))
        h = h + self._norm("post_attn_norm", y)
        x = self._norm("ffn_norm", h)
        f = gated(self.spec.activation, self.linear["gate"](x), self.linear["up"](x))
        y = self.linear["down"](self._norm("ffn_sub_norm", f))
        return h + self._norm("post_ffn_norm", y)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Apply the norm called `name`, or nothing where the layer has none."""
        gain = self._gains.get(name)
        return x if gain is None else rms_norm(x, gain, self.spec.norm_eps)
