"""A tiny model twice: as a Hugging Face directory, and as a GGUF file of the same weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gguf_files import encode, write_gguf
from synthetic import random_codes, random_uniform

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 256, 512, 4, 2, 64, 2, 96
SHAPES = {
    "q": (HEADS * HEAD_DIM, HIDDEN),
    "k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate": (FFN, HIDDEN),
    "up": (FFN, HIDDEN),
    "down": (HIDDEN, FFN),
}
GGUF_NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
HF_NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def scale_of(layer: int, name: str) -> np.float32:
    """A scale that float16 and bfloat16 hold."""
    return np.float32(0.0625) * np.float32(1 + (layer + len(name)) % 3)


def codes_of(layer: int, name: str) -> np.ndarray:
    return random_codes(layer, name, SHAPES[name])


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as converters write them for the architecture `llama`."""
    parts = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(rows.shape))


def _dense(sub_norms: bool, tied: bool, qk_norm: bool) -> dict[str, np.ndarray]:
    """Dense tensors by their canonical names; embedding and head as float16 hold them."""
    half = {"embed": (VOCAB, HIDDEN)} | ({} if tied else {"head": (VOCAB, HIDDEN)})
    found = {
        name: random_uniform(5, name, shape).astype(np.float16).astype(np.float32)
        for name, shape in half.items()
    }
    vectors = {"final_norm": HIDDEN}
    for layer in range(LAYERS):
        vectors |= {f"layers.{layer}.attn_norm": HIDDEN, f"layers.{layer}.ffn_norm": HIDDEN}
        if sub_norms:
            vectors[f"layers.{layer}.attn_sub_norm"] = HEADS * HEAD_DIM
            vectors[f"layers.{layer}.ffn_sub_norm"] = FFN
        if qk_norm:
            vectors |= {f"layers.{layer}.q_norm": HEAD_DIM, f"layers.{layer}.k_norm": HEAD_DIM}
    for name, size in vectors.items():
        found[name] = np.float32(1) + np.float32(0.25) * random_uniform(5, name, (size,))
    return found


def write_twins(
    directory: Path,
    kind: str = "I2_S",
    architecture: str = "bitnet-b1.58",
    *,
    tied: bool = True,
    layout: str = "x86_128",
    head: str = "F16",
    llama3_rope: bool = False,
    metadata: dict[str, tuple[str, Any]] | None = None,
    tensors: dict[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write both; return the Hugging Face directory and the GGUF file."""
    sub_norms = architecture.startswith("bitnet")
    dense = _dense(sub_norms, tied, architecture == "qwen3")
    hf = directory / "hf"
    hf.mkdir(parents=True, exist_ok=True)
    _write_hf(hf, dense, architecture, tied, llama3_rope)
    content = _gguf_tensors(dense, kind, architecture, layout, head)
    if llama3_rope:
        content["rope_freqs.weight"] = ("F32", (HEAD_DIM // 2,), llama3_table().tobytes())
    pairs = {**gguf_metadata(architecture), **(metadata or {})}
    path = directory / f"tiny-{kind}.gguf"
    write_gguf(path, pairs, {**content, **(tensors or {})})
    return hf, path


def gguf_metadata(architecture: str) -> dict[str, tuple[str, Any]]:
    numbers = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "rope.dimension_count": HEAD_DIM,
    }
    return {
        "general.architecture": ("str", architecture),
        "general.name": ("str", "tiny"),
        **{f"{architecture}.{key}": ("u32", number) for key, number in numbers.items()},
        f"{architecture}.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        f"{architecture}.rope.freq_base": ("f32", 500000.0),
    }


def _gguf_tensors(
    dense: dict[str, np.ndarray], kind: str, architecture: str, layout: str, head: str
) -> dict[str, Any]:
    top = {"embed": "token_embd", "head": "output", "final_norm": "output_norm"}
    part = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
    tensors: dict[str, Any] = {}
    for name, values in dense.items():
        if name in top:
            stored = f"{top[name]}.weight"
        else:
            _, layer, short = name.split(".")
            stored = f"blk.{layer}.{part.get(short, short)}.weight"
        if values.ndim == 2 and head == "F16":
            tensors[stored] = ("F16", values.shape, values.astype(np.float16).tobytes())
        else:
            tensors[stored] = ("F32", values.shape, values.tobytes())
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            data = _encoded(layer, name, kind, layout, architecture == "llama")
            tensors[f"blk.{layer}.{GGUF_NAMES[name]}.weight"] = (kind, shape, data)
    return tensors


@cache
def _encoded(layer: int, name: str, kind: str, layout: str, is_llama: bool) -> bytes:
    codes = codes_of(layer, name)
    if is_llama and name in ("q", "k"):
        codes = permuted(codes, HEADS if name == "q" else KV_HEADS)
    return encode(kind, codes, float(scale_of(layer, name)), layout)


def llama3_table() -> np.ndarray:
    """What converters write for LLAMA3_ROPE, by their formula, float32 [HEAD_DIM / 2]."""
    exponents = np.arange(0, HEAD_DIM, 2, dtype=np.float32) / np.float32(HEAD_DIM)
    table = []
    for wavelength in 2 * np.pi * 500000.0**exponents:
        if wavelength < 8192 / 4.0:
            table.append(1.0)
        elif wavelength > 8192 / 1.0:
            table.append(32.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            table.append(1 / ((1 - smooth) / 32.0 + smooth))
    return np.array(table, np.float32)


def _write_hf(
    directory: Path, dense: dict[str, np.ndarray], architecture: str, tied: bool, llama3: bool
) -> None:
    names = {"bitnet-b1.58": "BitNet", "bitnet": "Bitnet", "llama": "Llama", "qwen3": "Qwen3"}
    config = {
        "architectures": [f"{names[architecture]}ForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "relu2" if architecture == "bitnet-b1.58" else "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 128,
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
        **({"rope_scaling": LLAMA3_ROPE} if llama3 else {}),
    }
    (directory / "config.json").write_text(json.dumps(config))
    top = {"embed": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm"}
    part = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm",
        "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    }  # fmt: skip
    tensors = {}
    for name, values in dense.items():
        if name in top:
            stored = values.astype(np.float16) if values.ndim == 2 else values
            tensors[f"{top[name]}.weight"] = stored
        else:
            _, layer, short = name.split(".")
            tensors[f"model.layers.{layer}.{part[short]}.weight"] = values
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            quarters = (codes_of(layer, name) + 1).astype(np.uint8).reshape(4, shape[0] // 4, -1)
            packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
            module = f"model.layers.{layer}.{HF_NAMES[name]}"
            tensors[f"{module}.weight"] = packed
            tensors[f"{module}.weight_scale"] = np.full(1, scale_of(layer, name), np.float32)
    save_file(tensors, directory / "model.safetensors")


def byte_tokenizer_metadata(bos: int, eos: int) -> dict[str, tuple[str, Any]]:
    """A byte-level vocabulary of VOCAB tokens without merges, for models of this size."""
    letters = [chr(code) for code in range(33, 33 + VOCAB - 4)]
    tokens = [*letters, "Ġ", "Ċ", "<s>", "</s>"]
    return {
        "tokenizer.ggml.model": ("str", "gpt2"),
        "tokenizer.ggml.pre": ("str", "gpt-2"),
        "tokenizer.ggml.tokens": ("[str]", tokens),
        "tokenizer.ggml.token_type": ("[i32]", [1] * (VOCAB - 2) + [3, 3]),
        "tokenizer.ggml.merges": ("[str]", []),
        "tokenizer.ggml.bos_token_id": ("u32", bos),
        "tokenizer.ggml.eos_token_id": ("u32", eos),
        "tokenizer.ggml.add_bos_token": ("bool", True),
    }
