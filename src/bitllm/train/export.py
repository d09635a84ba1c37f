"""Writes a trained model as a Hugging Face folder in the packed `bitnet` format.

The seven projections of a layer become 2-bit codes in uint8 with a bfloat16 `weight_scale` that
multiplies (`linear_class` "autobitlinear", mode "offline"); everything else is bfloat16. bitllm
loads the folder, and so does `BitNetForCausalLM` of transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitllm.checkpoint import ModelSpec
from bitllm.errors import UnsupportedModelError
from bitllm.train.bitlinear import BitLinear, quantize_weights
from bitllm.train.model import TernaryDecoder
from bitllm.train.recipe import ExportSettings
from bitllm.train.tokenizer_training import BEGIN, END, END_OF_TURN, tokenizer_config

__all__ = ["export_model", "pack_rows", "packed_state"]


def export_model(
    model: TernaryDecoder, tokenizer: Path, folder: Path, settings: ExportSettings
) -> Path:
    """Write a model folder; an older one of that name is replaced once the new one is whole.

    Args:
        model: what to write.
        tokenizer: its tokenizer.json, trained by `train_tokenizer`.
        folder: the folder to write.
        settings: defaults of generation.

    Returns:
        `folder`.

    Raises:
        UnsupportedModelError: the format cannot say this architecture.
    """
    config = bitnet_config(model.spec)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shutil.copyfile(tokenizer, temporary / "tokenizer.json")
    ids = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"]
    special = {entry["content"]: entry["id"] for entry in ids}
    config |= {"bos_token_id": special[BEGIN], "eos_token_id": special[END]}
    _write_json(temporary / "config.json", config)
    _write_json(temporary / "tokenizer_config.json", tokenizer_config(model.spec.max_context))
    _write_json(temporary / "generation_config.json", _generation_config(special, settings))
    weights = temporary / "model.safetensors"
    save_file(packed_state(model), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the writer leaves it readable for its owner alone
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)
    return folder


def packed_state(model: TernaryDecoder) -> dict[str, Tensor]:
    """Return the tensors of the packed format by their published names.

    Ternary weights: uint8 [out / 4, in] and bfloat16 [1]; the rest: bfloat16.
    """
    state: dict[str, Tensor] = {}
    ternary = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}
    for name, module in ternary.items():
        codes, scale = quantize_weights(module.weight.detach())
        state[f"{name}.weight"] = pack_rows(codes)
        state[f"{name}.weight_scale"] = scale.bfloat16().reshape(1)
    for name, parameter in model.named_parameters():
        if name not in state:
            state[name] = parameter.detach().bfloat16().contiguous()
    return state


def pack_rows(codes: Tensor) -> Tensor:
    """Pack codes [out, in] of -1, 0, +1 into uint8 [out / 4, in], out a multiple of 4.

    Byte [r, k] holds code + 1 of rows r, r + out / 4, r + out / 2 and r + 3 out / 4 of column k,
    the first in its lowest two bits.
    """
    quarters = (codes + 1).to(torch.uint8).reshape(4, -1, codes.shape[1])
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def bitnet_config(spec: ModelSpec) -> dict[str, Any]:
    """Return config.json for an architecture, without the token ids.

    Raises:
        UnsupportedModelError: layers that differ, or switches that a `bitnet` config cannot say.
    """
    layer = spec.layers[0]
    linears = [linear for _, linear in spec.linear_names()]
    plain = layer.attn_norm and layer.ffn_norm and layer.attn_sub_norm and layer.ffn_sub_norm
    sayable = {
        "layers that differ": all(other == layer for other in spec.layers),
        "missing norms": plain,
        "q/k norms or post-norms": not (layer.qk_norm or layer.post_norms),
        "a sliding window": layer.sliding_window is None,
        "scaled RoPE": layer.rope.scaling == "none" and layer.rope.dim == layer.head_dim,
        "an embedding scale": spec.embedding_scale == 1.0,
        "two norm epsilons": spec.norm_eps == layer.norm_eps,
        "a query scale of its own": abs(layer.query_scale * layer.head_dim**0.5 - 1) < 1e-6,
        "norms or biases of a linear": all(
            linear.norm_eps is None and not linear.bias for linear in linears
        ),
        "activations that are not int8": all(linear.activation_bits == 8 for linear in linears),
        "an output size that is no multiple of 4": all(
            linear.out_features % 4 == 0 for linear in linears
        ),
    }
    for what, fine in sayable.items():
        if not fine:
            raise UnsupportedModelError(f"the packed bitnet format cannot hold a model with {what}")
    activation = {"relu2": "relu2", "silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": layer.head_dim,
        "hidden_act": activation[layer.activation],
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": layer.gate.out_features,
        "max_position_embeddings": spec.max_context,
        "num_attention_heads": layer.num_heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": layer.num_kv_heads,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": layer.rope.theta,
        "tie_word_embeddings": spec.tied_head,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }


def _generation_config(special: dict[str, int], settings: ExportSettings) -> dict[str, Any]:
    return {
        "bos_token_id": special[BEGIN],
        "eos_token_id": [special[END], special[END_OF_TURN]],
        "do_sample": settings.temperature > 0,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "repetition_penalty": settings.repetition_penalty,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
