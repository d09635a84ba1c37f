"""The names of tensors in files of transformers, for the canonical names of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection

from bitllm.checkpoint import ModelSpec

__all__ = ["LINEAR_MODULES", "MAY_BE_UNUSED", "NORMS", "TensorNames"]

LINEAR_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""The module of each ternary projection, within its layer."""

_NORMS = {
    "attn_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    # As BitNet calls them, and as the models of 1bitLLM do.
    "attn_sub_norm": ("self_attn.attn_sub_norm", "self_attn.inner_attn_ln"),
    "ffn_sub_norm": ("mlp.ffn_sub_norm", "mlp.ffn_layernorm"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
}
# Layers with norms behind their blocks too (Gemma) use one of the names for another norm.
_NORMS_OF_FOUR = {
    "ffn_norm": ("pre_feedforward_layernorm",),
    "post_attn_norm": ("post_attention_layernorm",),
    "post_ffn_norm": ("post_feedforward_layernorm",),
}
NORMS = frozenset(_NORMS) | frozenset(_NORMS_OF_FOUR)
"""Last parts of the canonical names of norms that belong to a layer."""

_LINEAR_PARTS = {"norm": ("rms_norm.weight", "norm.weight"), "bias": ("bias",)}
MAY_BE_UNUSED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|self_attn\.masked_bias)$")
"""Tensors that may be in a file without being used: tables that can be computed."""


class TensorNames:
    """From canonical names to those in the files of one model.

    Args:
        spec: the architecture.
        present: names of all tensors in the files; they decide between spellings.
    """

    def __init__(self, spec: ModelSpec, present: Collection[str]) -> None:
        self._present = present
        self._prefix = "" if "embed_tokens.weight" in present else "model."
        four = bool(spec.layers) and spec.layers[0].post_norms
        self._norms = _NORMS | (_NORMS_OF_FOUR if four else {})

    def module(self, name: str) -> str:
        """Return the prefix of the tensors that belong to a matrix: `embed`, `head` or a linear."""
        if name in ("embed", "head"):
            return "lm_head" if name == "head" else f"{self._prefix}embed_tokens"
        _, layer, part = name.split(".")
        return f"{self._prefix}layers.{layer}.{LINEAR_MODULES[part]}"

    def dense(self, name: str) -> str:
        """Return the name of a dense tensor."""
        if name in ("embed", "head"):
            return f"{self.module(name)}.weight"
        if name == "final_norm":
            return f"{self._prefix}norm.weight"
        _, layer, part, *rest = name.split(".")
        if rest:
            module = self.module(f"layers.{layer}.{part}")
            return self._spelled([f"{module}.{suffix}" for suffix in _LINEAR_PARTS[rest[0]]])
        prefix = f"{self._prefix}layers.{layer}."
        return self._spelled([f"{prefix}{suffix}.weight" for suffix in self._norms[part]])

    def _spelled(self, spellings: list[str]) -> str:
        return next((name for name in spellings if name in self._present), spellings[0])
