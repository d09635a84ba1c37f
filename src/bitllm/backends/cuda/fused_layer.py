"""One decoder layer by the Triton kernels: fewer, larger products, and nothing kept in between."""

from __future__ import annotations

import numpy as np
import torch

from bitllm.backends.cuda.attention import Angles, KvCache, StepLayout
from bitllm.backends.cuda.kernels.attention import attend
from bitllm.backends.cuda.kernels.product import (
    GROUP_UNIT,
    gated_product,
    grouped_product,
    pack_rows,
    ternary_product,
)
from bitllm.backends.cuda.kernels.quantize import Codes, norm_quantize
from bitllm.backends.cuda.kernels.rope import rotate_and_store
from bitllm.backends.cuda.layer import gated, layer_gains
from bitllm.backends.cuda.linear import check_codes, check_scales, rms_norm
from bitllm.backends.cuda.tensors import vector
from bitllm.checkpoint import LINEAR_NAMES, Checkpoint

__all__ = ["FusedLayer", "can_fuse"]


def can_fuse(checkpoint: Checkpoint, index: int) -> bool:
    """Whether the kernels run a layer: int8 activations, and groups of one size or none."""
    spec = checkpoint.spec.layers[index]
    if any(spec.linear(name).activation_bits != 8 for name in LINEAR_NAMES):
        return False
    sizes = {checkpoint.scales(f"layers.{index}.{name}").group_size for name in LINEAR_NAMES}
    return len(sizes) == 1 and all(size is None or size % GROUP_UNIT == 0 for size in sizes)


class _Product:
    """The matrices of some projections that read one input, their rows one after another."""

    def __init__(
        self, checkpoint: Checkpoint, index: int, names: str | tuple[str, ...], device: torch.device
    ) -> None:
        layer = checkpoint.spec.layers[index]
        weights, scales, biases = [], [], []
        for name in names:
            full_name, spec = f"layers.{index}.{name}", layer.linear(name)
            matrix = checkpoint.ternary(full_name)
            check_codes(matrix.packed, f"{checkpoint.origin}: {full_name}")
            check_scales(matrix.scales, f"{checkpoint.origin}: {full_name}")
            weights.append(torch.from_numpy(pack_rows(matrix.packed, matrix.in_features)))
            self._columns, self.group_size = matrix.in_features, matrix.group_size
            groups = matrix.scales.shape[1:]
            rows = np.broadcast_to(matrix.scales, (matrix.out_features, *groups))
            scales.append(torch.from_numpy(np.array(rows)))
            if spec.bias:
                biases.append(vector(checkpoint, f"{full_name}.bias", device))
            else:
                biases.append(torch.zeros(matrix.out_features, device=device))
            checkpoint.release()
        self.weights = torch.cat(weights).to(device)
        self.scales = torch.cat(scales).to(device)
        has_bias = any(layer.linear(name).bias for name in names)
        self.bias = torch.cat(biases) if has_bias else None
        self.nbytes = self.weights.nbytes + self.scales.nbytes

    def __call__(self, x: Codes) -> torch.Tensor:
        if self.group_size is not None:
            sizes = self._columns, self.group_size
            return grouped_product(x, self.weights, self.scales, *sizes, self.bias)
        return ternary_product(x, self.weights, self.scales, self.bias)


class FusedLayer:
    """The weights of one decoder layer, for the kernels; computes what `Layer` does.

    Attributes:
        spec: its switches.
        nbytes: bytes of its matrices.
    """

    def __init__(self, checkpoint: Checkpoint, index: int, device: torch.device) -> None:
        self.spec = spec = checkpoint.spec.layers[index]
        self._gains = layer_gains(checkpoint, index, device)
        self._own_norms = {
            name: vector(checkpoint, f"layers.{index}.{name}.norm", device)
            for name in LINEAR_NAMES
            if spec.linear(name).norm_eps is not None
        }
        groups: list[tuple[str, ...]] = []
        for names in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            shared = all(spec.linear(name).norm_eps is None for name in names)
            groups += [names] if shared else [(name,) for name in names]
        self._products = {names: _Product(checkpoint, index, names, device) for names in groups}
        self.nbytes = sum(product.nbytes for product in self._products.values())

    def __call__(
        self, h: torch.Tensor, layout: StepLayout, angles: Angles, cache: KvCache
    ) -> torch.Tensor:
        """Return the hidden states after this layer, float32 [tokens, hidden]."""
        spec = self.spec
        qkv = self._project(("q", "k", "v"), h, "attn_norm")
        norms = (self._gains["q_norm"], self._gains["k_norm"]) if spec.qk_norm else None
        queries = rotate_and_store(
            qkv,
            (angles.cosine, angles.sine),
            norms,
            spec.norm_eps,
            cache.tensors,
            layout.slots,
            spec.num_heads,
        )
        attended = attend(
            queries,
            cache.tensors,
            layout.tables,
            layout.runs,
            layout.positions,
            spec.query_scale,
            spec.sliding_window,
        )
        h = h + self._norm("post_attn_norm", self._project(("o",), attended, "attn_sub_norm"))
        f = self._gated(h)
        return h + self._norm("post_ffn_norm", self._project(("down",), f, "ffn_sub_norm"))

    def _project(self, names: tuple[str, ...], x: torch.Tensor, norm: str) -> torch.Tensor:
        if names in self._products:
            return self._products[names](self._quantize(names[0], x, norm))
        # Each has a norm of its own, so none shares its codes.
        parts = [self._products[(name,)](self._quantize(name, x, norm)) for name in names]
        return torch.cat(parts, dim=1)

    def _gated(self, h: torch.Tensor) -> torch.Tensor:
        both = self._products.get(("gate", "up"))
        if both is None or both.group_size is not None:
            gate, up = self._project(("gate", "up"), h, "ffn_norm").chunk(2, dim=1)
            return gated(self.spec.activation, gate, up)
        codes = self._quantize("gate", h, "ffn_norm")
        return gated_product(codes, both.weights, both.scales, both.bias, self.spec.activation)

    def _quantize(self, name: str, x: torch.Tensor, norm: str) -> Codes:
        """Apply the norm of the block and that of the projection, then round."""
        shared, own = self._gains.get(norm), self._own_norms.get(name)
        if own is None:
            return norm_quantize(x, shared, self.spec.norm_eps)
        if shared is not None:
            x = rms_norm(x, shared, self.spec.norm_eps)
        return norm_quantize(x, own, self.spec.linear(name).norm_eps or 0.0)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gain = self._gains.get(name)
        return x if gain is None else rms_norm(x, gain, self.spec.norm_eps)
