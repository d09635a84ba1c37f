"""A model directory small enough to write for a test: one byte a token, random ternary weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 32, 48, 4, 2, 2
CONTEXT = 8192
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_model(directory: Path, *, chat: bool = True) -> Path:
    """Write a packed BitNet checkpoint with tokenizer; it never says its stop token by itself."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = _write_tokenizer(directory, chat)
    config = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_tensors(vocab), directory / "model.safetensors")
    return directory


def _write_tokenizer(directory: Path, chat: bool) -> int:
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


def _tensors(vocab: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    head_dim = HIDDEN // HEADS
    embed = random.standard_normal((vocab, HIDDEN)).astype(np.float32)
    # Rows of zeros never have the largest product: start and stop token are not written.
    embed[-2:] = 0
    tensors = {
        "model.embed_tokens.weight": embed,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * head_dim, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * head_dim, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    norms = {
        "input_layernorm": HIDDEN,
        "post_attention_layernorm": HIDDEN,
        "self_attn.attn_sub_norm": HIDDEN,
        "mlp.ffn_sub_norm": FFN,
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, size in norms.items():
            tensors[f"{prefix}{name}.weight"] = np.ones(size, np.float32)
        for name, (rows, columns) in shapes.items():
            codes = random.integers(0, 3, (4, rows // 4, columns), dtype=np.uint8)
            packed = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
            tensors[f"{prefix}{name}.weight"] = packed
            tensors[f"{prefix}{name}.weight_scale"] = np.full(1, 0.5, np.float32)
    return tensors
