"""A small model directory as transformers writes it, with everything open to change."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bitllm.checkpoint import Checkpoint
from bitllm.formats import open_checkpoint

HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 16, 22, 17, 4, 2, 4
SHAPES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (22, 16),
    "mlp.up_proj": (22, 16),
    "mlp.down_proj": (16, 22),
}
NAMES = dict(zip(("q", "k", "v", "o", "gate", "up", "down"), SHAPES, strict=True))
GATE = "model.layers.0.mlp.gate_proj.weight"
BITNET = {"quant_method": "bitnet"}
MULTIPLY = {**BITNET, "linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {**BITNET, "linear_class": "autobitlinear", "quantization_mode": "online"}


def row_strided(codes: np.ndarray) -> np.ndarray:
    """The packing of transformers, written out: row r + i * R is at bits 2i of packed row r."""
    rows = -(-len(codes) // 4)
    packed = np.zeros((rows, codes.shape[1]), np.uint8)
    for row, values in enumerate(codes):
        packed[row % rows] |= ((values + 1) << (2 * (row // rows))).astype(np.uint8)
    return packed


@dataclass
class Model:
    """A model directory to be written, with everything open to change."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    codes: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        (directory / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, directory / "model.safetensors")
        return directory

    def open(self, directory: Path) -> Checkpoint:
        return open_checkpoint(self.write(directory))


def make_model(
    architecture: str = "BitNetForCausalLM",
    *,
    quantization: dict[str, Any] | None = None,
    masters: bool = False,
    dtype: type = np.float32,
    **config: Any,
) -> Model:
    """A small model with one layer; sub-norms for BitNet, a head unless it is tied."""
    rng = np.random.default_rng(7)
    model = Model(
        {
            "architectures": [architecture],
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "a key nobody knows": {"x": [1]},
            "quantization_config": MULTIPLY if quantization is None else quantization,
            **config,
        }
    )

    def dense(name: str, *shape: int) -> None:
        model.tensors[name] = rng.standard_normal(shape).astype(dtype)

    dense("model.embed_tokens.weight", VOCAB, HIDDEN)
    dense("model.norm.weight", HIDDEN)
    if not config.get("tie_word_embeddings"):
        dense("lm_head.weight", VOCAB, HIDDEN)
    prefix = "model.layers.0."
    dense(prefix + "input_layernorm.weight", HIDDEN)
    dense(prefix + "post_attention_layernorm.weight", HIDDEN)
    if architecture == "BitNetForCausalLM":
        dense(prefix + "self_attn.attn_sub_norm.weight", HIDDEN)
        dense(prefix + "mlp.ffn_sub_norm.weight", FFN)
    for index, (name, module) in enumerate(NAMES.items()):
        if masters:
            dense(f"{prefix}{module}.weight", *SHAPES[module])
            continue
        codes = rng.integers(-1, 2, SHAPES[module]).astype(np.int8)
        model.codes[name] = codes
        model.tensors[f"{prefix}{module}.weight"] = row_strided(codes)
        scale = np.array([0.5 + index / 8], dtype)
        model.tensors[f"{prefix}{module}.weight_scale"] = scale
    return model
