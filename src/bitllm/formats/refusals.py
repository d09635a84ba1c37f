"""Models that bitllm recognises and does not run: what they are, and what to do instead.

Everything here would be refused anyway, by its architecture or by a tensor that has no place. This
says it by name, before weights are looked at, and with advice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitllm.errors import UnsupportedModelError

__all__ = ["refuse_known_models", "unknown_architecture"]

_SEE_GGUF = "look for a GGUF file of the model and the program that its authors name"
_LLAMA_LIKE = (
    "bitllm runs decoders of the Llama family with ternary projections, "
    "for example microsoft/bitnet-b1.58-2B-4T"
)

# A pattern of the architecture or the model type, what the model is, and advice.
_ARCHITECTURES: tuple[tuple[str, str, str], ...] = (
    (r"hgrn", "MMfreeLM (HGRN), a recurrent network without attention", _LLAMA_LIKE),
    (r"mamba|rwkv|retnet|falcon_?h1|jamba|zamba|bamba|nemotron_?h|xlstm|recurrentgemma",
     "a recurrent network, or one with recurrent layers", _LLAMA_LIKE),
    (r"moe|mixtral|deepseek|gpt_?oss|granitemoe|jetmoe|dbrx|llama4",
     "a mixture of experts", _LLAMA_LIKE),
    (r"qwen3_?next|qwen3_?5|kimi_?linear|lfm2",
     "a network with layers of linear attention or convolutions", _SEE_GGUF),
    (r"minicpm", "MiniCPM (BitCPM), whose scalings of embedding, layers and logits and whose "
     "longrope positions are not computed", _SEE_GGUF),
    (r"hunyuan|hy_?v\d", "Hunyuan, which norms queries and keys behind RoPE", _SEE_GGUF),
    (r"bitnet_?v2|bitnet2|hbitlinear", "a BitNet v2, whose activations are rotated and have 4 "
     "bits", _LLAMA_LIKE),
    (r"conditionalgeneration|vision|llava|(^|_)vl($|_)|vlfor|audio|speech|asr|omni",
     "a model of images, sound or several of these", "use the text model that it was made from"),
    (r"diffusion", "a diffusion model", _LLAMA_LIKE),
)  # fmt: skip

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MODALITIES = ("vision_config", "audio_config", "speech_config", "thinker_config")
_ROTATED = re.compile(r"hadamard|walsh|fwht|rotat(?:ion|ed|e_activations)|quarot|spinquant")
_ROTATED_TENSOR = re.compile(r"hadamard|fwht|(^|[._])signs?$|rotation(_matrix)?(\.weight)?$")
_ROTATED_NAME = re.compile(r"bonsai-2(?![\d.]*b)", re.IGNORECASE)


def refuse_known_models(path: Path, fields: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Refuse models of kinds that are known and not supported.

    Args:
        path: config.json, for messages.
        fields: its contents.
        tensors: names of the tensors in the model's files.

    Raises:
        UnsupportedModelError: it is one; says which kind, and what to do.
    """
    for what, advice in _reasons(fields, tensors):
        raise UnsupportedModelError(f"{path}: this is {what}; that is not supported", hint=advice)


def unknown_architecture(
    path: Path, fields: Mapping[str, Any], name: str, supported: Collection[str]
) -> UnsupportedModelError:
    """Return the error for an architecture that nothing is known about.

    Args:
        path: config.json, for messages.
        fields: its contents.
        name: of the architecture.
        supported: names of those that are.
    """
    hint = f"supported are {', '.join(supported)}"
    if fields.get("auto_map"):
        return UnsupportedModelError(
            f"{path}: architecture {name!r} is defined by code that comes with the model "
            "(trust_remote_code), which bitllm never runs",
            hint=hint,
        )
    return UnsupportedModelError(f"{path}: architecture {name!r} is not supported", hint=hint)


def _reasons(fields: Mapping[str, Any], tensors: Collection[str]) -> Iterator[tuple[str, str]]:
    if _is_rotated(fields, tensors):
        yield (
            "a model with rotated weights (Bonsai-2 and its like), whose activations have to be "
            "rotated as well",
            "use the first Ternary-Bonsai, or the program of its authors",
        )
    names = " ".join(_names(fields))
    for pattern, what, advice in _ARCHITECTURES:
        if re.search(pattern, names):
            yield f"{what} ({names})", advice
    if any(_more_than_one(fields.get(key)) for key in _EXPERTS):
        yield "a mixture of experts", _LLAMA_LIKE
    if any(isinstance(fields.get(key), dict) for key in _MODALITIES):
        yield "a model of images or sound", "use the text model that it was made from"
    if fields.get("is_encoder_decoder") is True:
        yield "an encoder with a decoder", _LLAMA_LIKE
    kinds = fields.get("layer_types")
    if isinstance(kinds, list) and any("linear" in str(kind) for kind in kinds):
        yield "a network with layers of linear attention", _SEE_GGUF


def _names(fields: Mapping[str, Any]) -> list[str]:
    """The architecture and the model type, in lower case."""
    names = fields.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    found = (first, fields.get("model_type"))
    return [name.lower()[:100] for name in found if isinstance(name, str) and name]


def _more_than_one(count: object) -> bool:
    return isinstance(count, int) and count > 1


def _is_rotated(fields: Mapping[str, Any], tensors: Collection[str]) -> bool:
    name = fields.get("_name_or_path")
    if isinstance(name, str) and _ROTATED_NAME.search(name):
        return True
    nested = (fields.get(key) for key in ("quantization", "quantization_config"))
    sections = [fields, *(section for section in nested if isinstance(section, dict))]
    keys = (key.lower() for part in sections for key, value in part.items() if value)
    if any(_ROTATED.search(key) for key in keys):
        return True
    return any(_ROTATED_TENSOR.search(tensor.lower()) for tensor in tensors)
