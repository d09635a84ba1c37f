"""A model under training as a checkpoint in memory: what a backend would load from its export."""

from __future__ import annotations

import numpy as np

from bitllm.checkpoint import Checkpoint, DenseTensor, TernaryMatrix
from bitllm.train.model import TernaryDecoder
from bitllm.train.quantizers import quantize_weights
from synthetic import MemorySource

_LINEARS = {name: f"self_attn.{name}_proj" for name in "qkvo"}
_LINEARS |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_attn_norm": "attn_output_norm",
    "post_ffn_norm": "ffn_output_norm",
}


def _torch_name(canonical: str) -> str:
    fixed = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
    fixed["final_norm"] = "model.norm.weight"
    if canonical in fixed:
        return fixed[canonical]
    _, layer, name, *rest = canonical.split(".")
    prefix = f"model.layers.{layer}."
    if name in _NORMS:
        return f"{prefix}{_NORMS[name]}.weight"
    suffix = {"": "weight", "norm": "rms_norm.weight", "bias": "bias"}["".join(rest)]
    return f"{prefix}{_LINEARS[name]}.{suffix}"


def torch_checkpoint(model: TernaryDecoder) -> Checkpoint:
    """Dense tensors in float32, ternary ones by their codes."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    dense = {
        name: DenseTensor(state[_torch_name(name)].float().numpy(), "f32")
        for name in model.spec.dense_shapes()
    }
    matrices = {}
    for name, _ in model.spec.linear_names():
        codes, scale = quantize_weights(state[_torch_name(name)])
        matrices[name] = TernaryMatrix.from_codes(codes.numpy().astype(np.int8), scale.numpy())
    return Checkpoint(model.spec, MemorySource(dense, matrices), "model in training")
