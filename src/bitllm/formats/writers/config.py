"""config.json of a model that transformers is to load: carried over, or made from a `ModelSpec`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitllm.checkpoint import LINEAR_NAMES, LayerSpec, ModelSpec, ScaleConvention
from bitllm.errors import UnsupportedModelError
from bitllm.formats.architecture import read_model_spec
from bitllm.formats.quantization import read_quantization
from bitllm.formats.writers.differences import spec_differences
from bitllm.formats.writers.texts import CONFIG_FILE, ModelTexts

__all__ = ["default_convention", "huggingface_config", "plan_config", "plan_mlx_config"]

_WITHOUT_CLASS = ("BitnetForCausalLM",)  # named in a config.json, but not known to transformers
_ATTENTION = ("q", "k", "v", "o")
_ACTIVATIONS = {"relu2": "relu2", "silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def default_convention(spec: ModelSpec) -> ScaleConvention:
    """Return what published models of this kind do: those with sub-norms multiply by the scale."""
    return "multiply" if spec.layers[0].attn_sub_norm else "divide"


def _quantization_section(
    spec: ModelSpec, convention: ScaleConvention, *, keep: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return `quantization_config` for packed weights.

    Args:
        spec: the architecture.
        convention: "multiply" names the class autobitlinear; "divide" names none, as published.
        keep: the section of the source, whose list of dense modules is kept.
    """
    section: dict[str, Any] = {"quant_method": "bitnet"}
    if convention == "multiply":
        section |= {"linear_class": "autobitlinear", "quantization_mode": "offline"}
    eps = spec.layers[0].q.norm_eps
    if eps is not None:
        section |= {"use_rms_norm": True, "rms_norm_eps": _shortest(eps)}
    skipped = (keep or {}).get("modules_to_not_convert")
    if skipped is not None:
        section["modules_to_not_convert"] = skipped
    return section


def plan_config(
    spec: ModelSpec,
    texts: ModelTexts,
    convention: ScaleConvention,
    *,
    tensors: Collection[str],
    dtype: str,
) -> bytes:
    """Return config.json for packed weights; that of the source, byte for byte, if it says so.

    Args:
        spec: the architecture.
        texts: the source's text files.
        convention: of the weight scales.
        tensors: names of the tensors that will be written.
        dtype: of the embedding: "bf16", "f16" or "f32".

    Raises:
        UnsupportedModelError: config.json cannot say this architecture; names the reason.
    """
    fields = _carried(spec, texts, convention)
    if fields is None:
        fields = {**huggingface_config(spec, convention, dtype), **texts.token_ids}
    _check_config(spec, fields, tensors)
    if texts.config is not None and fields == texts.config:
        return texts.config_bytes
    return _json(fields)


def plan_mlx_config(
    spec: ModelSpec, texts: ModelTexts, group_size: int, *, tensors: Collection[str], dtype: str
) -> bytes:
    """Return config.json for MLX's affine 2-bit weights.

    `input_bits` is what 1bitLLM's configurations call the bits of activations; MLX itself leaves
    activations as they are.

    Args:
        spec: the architecture.
        texts: the source's text files.
        group_size: weights along a row that share a scale.
        tensors: names of the dense tensors that will be written, as transformers has them.
        dtype: of the embedding: "bf16", "f16" or "f32".

    Raises:
        UnsupportedModelError: config.json cannot say this architecture; names the reason.
    """
    fields = _carried(spec, texts, "multiply")
    if fields is None:
        made = huggingface_config(_with_int8_activations(spec), "multiply", dtype)
        fields = {**made, **texts.token_ids}
    del fields["quantization_config"]
    fields["quantization"] = {"group_size": group_size, "bits": 2}
    fields |= {"weight_bits": 1, "input_bits": spec.layers[0].q.activation_bits}
    _check_config(spec, fields, tensors)
    return _json(fields)


def _with_int8_activations(spec: ModelSpec) -> ModelSpec:
    """The same model but for its activations, which MLX's weights say nothing about."""

    def rounded(layer: LayerSpec) -> LayerSpec:
        linears: dict[str, Any] = {
            name: dataclasses.replace(layer.linear(name), activation_bits=8)
            for name in LINEAR_NAMES
        }
        return dataclasses.replace(layer, **linears)

    return dataclasses.replace(spec, layers=tuple(map(rounded, spec.layers)))


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _carried(
    spec: ModelSpec, texts: ModelTexts, convention: ScaleConvention
) -> dict[str, Any] | None:
    """Return the source's fields for packed weights, None where transformers has no such class."""
    if texts.config is None or spec.architecture in _WITHOUT_CLASS:
        return None
    fields = dict(texts.config)
    before = fields.get("quantization_config")
    if isinstance(before, dict) and _says(fields, spec, convention):
        return fields
    for key in ("quantization", "auto_map", "weight_bits", "input_bits"):
        fields.pop(key, None)
    keep = before if isinstance(before, dict) else None
    fields["quantization_config"] = _quantization_section(spec, convention, keep=keep)
    return fields


def _says(fields: Mapping[str, Any], spec: ModelSpec, convention: ScaleConvention) -> bool:
    """Whether a configuration already describes packed weights of this convention."""
    if fields["quantization_config"].get("quant_method") != "bitnet" or "quantization" in fields:
        return False
    found = read_quantization(Path(CONFIG_FILE), fields)
    return found.convention == convention and found.weights == "values"


def _check_config(spec: ModelSpec, fields: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Refuse a configuration from which another architecture would be read.

    Raises:
        UnsupportedModelError: names the first thing that differs.
    """
    path = Path(CONFIG_FILE)
    found = read_model_spec(path, fields, read_quantization(path, fields, tensors), tensors)
    different = spec_differences(spec, found)
    if not different:
        return
    raise UnsupportedModelError(
        f"the config.json of {fields['architectures'][0]} cannot say this model's {different[0]}",
        hint="write it as another format",
    )


def huggingface_config(
    spec: ModelSpec, convention: ScaleConvention = "multiply", dtype: str = "bf16"
) -> dict[str, Any]:
    """Return config.json for an architecture, without the token ids.

    Args:
        spec: the architecture.
        convention: of the weight scales.
        dtype: of the embedding.

    Raises:
        UnsupportedModelError: layers that differ, or switches that no such config can say.
    """
    _check_sayable(spec)
    layer = spec.layers[0]
    name, model_type, extra = _architecture(layer)
    fields = {
        "architectures": [name],
        "model_type": model_type,
        "attention_dropout": 0.0,
        **extra,
        "head_dim": layer.head_dim,
        "hidden_act": _ACTIVATIONS[layer.activation],
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": layer.gate.out_features,
        "max_position_embeddings": spec.max_context,
        "num_attention_heads": layer.num_heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": layer.num_kv_heads,
        "quantization_config": _quantization_section(spec, convention),
        "rms_norm_eps": _shortest(spec.norm_eps),
        "rope_theta": layer.rope.theta,
        "tie_word_embeddings": spec.tied_head,
        "torch_dtype": _DTYPES[dtype],
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    scaling = _rope_scaling(layer)
    return fields if scaling is None else {**fields, "rope_scaling": scaling}


def _shortest(value: float) -> float:
    """Return the number with the fewest digits that float32 holds as the same: 1e-5 for 1e-5f."""
    return float(str(np.float32(value)))


def _architecture(layer: LayerSpec) -> tuple[str, str, dict[str, Any]]:
    """Return the class of transformers that has these layers, its model_type, and its switches."""
    biased = {name for name in LINEAR_NAMES if layer.linear(name).bias}
    attention = {"attention_bias": biased >= set(_ATTENTION)}
    if layer.attn_sub_norm:
        return "BitNetForCausalLM", "bitnet", attention
    if layer.qk_norm:
        return "Qwen3ForCausalLM", "qwen3", attention
    if biased == {"q", "k", "v"}:
        return "Qwen2ForCausalLM", "qwen2", {}
    return "LlamaForCausalLM", "llama", {**attention, "mlp_bias": biased == set(LINEAR_NAMES)}


def _rope_scaling(layer: LayerSpec) -> dict[str, Any] | None:
    rope = layer.rope
    if rope.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_context,
        }
    return scaling


def _check_sayable(spec: ModelSpec) -> None:
    layer = spec.layers[0]
    linears = [linear for _, linear in spec.linear_names()]
    biased = {name for name in LINEAR_NAMES if layer.linear(name).bias}
    whole: tuple[set[str], ...] = (set(), set(_ATTENTION))
    if not layer.attn_sub_norm:
        whole = (*whole, {"q", "k", "v"}, set(LINEAR_NAMES))
    sayable = {
        "layers that differ": all(other == layer for other in spec.layers),
        "missing norms": layer.attn_norm
        and layer.ffn_norm
        and layer.attn_sub_norm == layer.ffn_sub_norm,
        "q/k norms or post-norms": not layer.post_norms
        and not (layer.qk_norm and layer.attn_sub_norm),
        "a sliding window": layer.sliding_window is None,
        "YaRN's RoPE": layer.rope.scaling != "yarn",
        "RoPE over a part of the head": layer.rope.dim == layer.head_dim,
        "an embedding scale": spec.embedding_scale == 1.0,
        "two norm epsilons": spec.norm_eps == layer.norm_eps,
        "a query scale of its own": abs(layer.query_scale * layer.head_dim**0.5 - 1) < 1e-6,
        "norms or biases of some linears": biased in whole
        and all(linear.norm_eps == layer.q.norm_eps for linear in linears),
        "activations that are not int8": all(linear.activation_bits == 8 for linear in linears),
        "an output size that is no multiple of 4": all(
            linear.out_features % 4 == 0 for linear in linears
        ),
    }
    for what, fine in sayable.items():
        if not fine:
            raise UnsupportedModelError(
                f"the packed bitnet format cannot hold a model with {what}",
                hint="MLX directories and GGUF files hold other kinds",
            )
