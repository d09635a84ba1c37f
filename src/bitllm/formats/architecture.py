"""config.json of Hugging Face models, read into a `ModelSpec`.

The decoders know one family of layers with switches; each supported architecture is an entry of
`ARCHITECTURES` that says how its configuration sets them. Keys that no entry reads are ignored, as
transformers ignores them; features that would change the result are refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitllm.checkpoint import (
    LINEAR_NAMES,
    Activation,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    RopeSpec,
)
from bitllm.errors import ConfigError, FormatError, NotTernaryError, UnsupportedModelError

__all__ = ["ARCHITECTURES", "Quantization", "read_model_spec", "read_quantization"]

_MAX_LAYERS = 10_000
_MAX_WIDTH = 1 << 30
_ACTIVATIONS: Mapping[str, Activation] = {
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_EXAMPLE = "for example microsoft/bitnet-b1.58-2B-4T"


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What transformers' class of this name does where config.json is silent, and what it fixes.

    `bias` names the projections that have a bias whatever the configuration says; `bias_keys` maps
    a key of config.json to the projections whose bias it switches. `sliding` says how the
    configuration asks for sliding-window attention.
    """

    hidden_act: str
    norm_eps: float
    rope_theta: float
    max_context: int
    head_dim: int | None = None
    sub_norms: bool = False
    qk_norm: bool = False
    bias: frozenset[str] = frozenset()
    bias_keys: tuple[tuple[str, frozenset[str]], ...] = ()
    sliding: Literal["never", "always", "switched"] = "never"


_ATTENTION = frozenset({"q", "k", "v", "o"})
_FEED_FORWARD = frozenset({"gate", "up", "down"})
_ATTENTION_BIAS = (("attention_bias", _ATTENTION),)
_LLAMA_BIAS = (*_ATTENTION_BIAS, ("mlp_bias", _FEED_FORWARD))

ARCHITECTURES: Mapping[str, _Architecture] = {
    "BitNetForCausalLM": _Architecture(
        "relu2", 1e-5, 500_000.0, 2048, sub_norms=True, bias_keys=_ATTENTION_BIAS
    ),
    # 1bitLLM's first reproduction: Llama with sub-norms under other names.
    "BitnetForCausalLM": _Architecture("silu", 1e-5, 10_000.0, 2048, sub_norms=True),
    "LlamaForCausalLM": _Architecture("silu", 1e-6, 10_000.0, 2048, bias_keys=_LLAMA_BIAS),
    "MistralForCausalLM": _Architecture("silu", 1e-6, 10_000.0, 131_072, sliding="always"),
    "Qwen2ForCausalLM": _Architecture(
        "silu", 1e-6, 10_000.0, 32_768, bias=frozenset({"q", "k", "v"}), sliding="switched"
    ),
    "Qwen3ForCausalLM": _Architecture(
        "silu", 1e-6, 10_000.0, 32_768,
        head_dim=128, qk_norm=True, bias_keys=_ATTENTION_BIAS, sliding="switched",
    ),
}  # fmt: skip
"""The supported architectures, by their name in config.json."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights of the projections are stored.

    Attributes:
        convention: a stored weight scale multiplies or divides the product.
        online: the weights are masters, to be quantised when they are read.
        norm_eps: epsilon of an RMSNorm of each projection's own input, None = there is none.
        skipped: modules that transformers leaves as they are.
    """

    convention: Literal["multiply", "divide"]
    online: bool
    norm_eps: float | None = None
    skipped: tuple[str, ...] | None = None


class _Config:
    """config.json with typed access; every failure names the file and the key."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def get(self, key: str) -> Any:
        return self.fields.get(key)

    def fail(self, key: str, wanted: str) -> FormatError:
        return FormatError(f"{self.path}: {key} should be {wanted}, got {self.get(key)!r:.100}")

    def size(self, key: str, default: int | None = None, most: int = _MAX_WIDTH) -> int:
        """A positive whole number; a key without default must be there."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise FormatError(
                f"{self.path}: {key} is missing", hint="the file is not a model's config.json"
            )
        if type(value) is not int or not 0 < value <= most:
            raise self.fail(key, f"a whole number from 1 to {most}")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "a positive number")
        if not (value > 0 and value < 1e300 and math.isfinite(value)):
            raise self.fail(key, "a positive number")
        return float(value)

    def switch(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def section(self, key: str) -> _Config | None:
        """A nested object, or None."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return _Config(self.path, value)

    def text(self, key: str, default: str) -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value


def read_quantization(path: Path, fields: Mapping[str, Any]) -> Quantization:
    """Read how the weights are stored from config.json's `fields`.

    Raises:
        NotTernaryError: the configuration describes a dense model, or another quantisation.
        UnsupportedModelError: a ternary variant that is not read.
        FormatError: a value of the wrong type.
    """
    config = _Config(path, fields)
    section = config.section("quantization_config")
    if section is None:
        return _quantization_without_section(config)
    method = section.text("quant_method", "").lower()
    if method != "bitnet":
        raise NotTernaryError(
            f"{path}: the weights are quantised with {method!r}, not ternary",
            hint=f"bitllm runs ternary models (quant_method 'bitnet'), {_EXAMPLE}",
        )
    linear_class = section.text("linear_class", "bitlinear")
    mode = section.text("quantization_mode", "offline")
    if linear_class not in ("bitlinear", "autobitlinear") or mode not in ("online", "offline"):
        raise UnsupportedModelError(
            f"{path}: unknown linear_class {linear_class!r} or quantization_mode {mode!r}",
            hint="known are bitlinear and autobitlinear, online and offline",
        )
    skipped = section.get("modules_to_not_convert")
    if skipped is not None and not (
        isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)
    ):
        raise section.fail("modules_to_not_convert", "a list of strings")
    return Quantization(
        convention="multiply" if linear_class == "autobitlinear" else "divide",
        online=mode == "online",
        norm_eps=section.positive("rms_norm_eps", 1e-6) if section.switch("use_rms_norm") else None,
        skipped=None if skipped is None else tuple(skipped),
    )


def _quantization_without_section(config: _Config) -> Quantization:
    if config.get("weight_bits") == 1 and config.get("input_bits") == 8:
        return Quantization("multiply", online=True)
    if config.get("pretraining_model_parallel") is not None:
        raise UnsupportedModelError(
            f"{config.path}: TriLM models, with several scales in a matrix and no quantisation "
            "of activations, are not supported yet",
            hint=f"try a BitNet b1.58 model, {_EXAMPLE}",
        )
    if config.section("quantization") is not None:
        raise UnsupportedModelError(
            f"{config.path}: MLX quantisation is not supported yet",
            hint="use the model's original Hugging Face repository",
        )
    raise NotTernaryError(
        f"{config.path}: no quantization_config, so these are the weights of a dense model",
        hint=f"bitllm runs ternary models, {_EXAMPLE}; for ternary master weights, set "
        '"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", '
        '"quantization_mode": "online"}',
    )


def read_model_spec(
    path: Path, fields: Mapping[str, Any], quantization: Quantization, tensors: Collection[str]
) -> ModelSpec:
    """Read the architecture of a model.

    Args:
        path: config.json, for messages.
        fields: its contents.
        quantization: what `read_quantization` returned for it.
        tensors: names of the tensors in the model's files; where config.json does not say whether
            the head is tied or whether there are sub-norms, they do.

    Raises:
        UnsupportedModelError: an architecture or a feature that the decoders do not have.
        FormatError: a key is missing or has an impossible value.
    """
    config = _Config(path, fields)
    name, architecture = _find_architecture(config)
    hidden = config.size("hidden_size")
    heads = config.size("num_attention_heads", most=65_536)
    count = config.size("num_hidden_layers", most=_MAX_LAYERS)
    max_context = config.size("max_position_embeddings", architecture.max_context)
    act = config.text("hidden_act", architecture.hidden_act)
    if act not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{path}: the activation {act!r} is not supported",
            hint=f"supported are {', '.join(_ACTIVATIONS)}",
        )
    head_dim = config.size("head_dim", architecture.head_dim or max(1, hidden // heads), 65_536)
    sub_norms = architecture.sub_norms or any(
        tensor.endswith(("attn_sub_norm.weight", "inner_attn_ln.weight")) for tensor in tensors
    )
    windows = _sliding_windows(config, architecture, count, max_context)
    shared: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": config.size("num_key_value_heads", heads, 65_536),
        "head_dim": head_dim,
        "rope": _read_rope(config, architecture, head_dim, max_context),
        "activation": _ACTIVATIONS[act],
        "norm_eps": config.positive("rms_norm_eps", architecture.norm_eps),
        "query_scale": 1.0 / math.sqrt(head_dim),
        "attn_sub_norm": sub_norms,
        "ffn_sub_norm": sub_norms,
        "qk_norm": architecture.qk_norm,
    }
    try:
        linears = _linear_specs(config, architecture, quantization, hidden, shared)
        by_window = {
            window: LayerSpec(**linears, **shared, sliding_window=window) for window in set(windows)
        }
    except ConfigError as error:
        raise FormatError(f"{path}: {error.message}", hint=error.hint) from error
    has_head = any(tensor.endswith("lm_head.weight") for tensor in tensors)
    return ModelSpec(
        architecture=name,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        layers=tuple(by_window[window] for window in windows),
        norm_eps=shared["norm_eps"],
        tied_head=config.switch("tie_word_embeddings", not has_head),
        max_context=max_context,
    )


def _find_architecture(config: _Config) -> tuple[str, _Architecture]:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        name = names[0]
    else:
        model_type = config.text("model_type", "")
        name = next((key for key in ARCHITECTURES if key.lower() == f"{model_type}forcausallm"), "")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{config.path}: architecture {name or config.get('model_type')!r} is not supported",
            hint=f"supported are {', '.join(ARCHITECTURES)}",
        )
    for key in ("parallel_attn", "alibi"):
        if config.get(key):
            raise UnsupportedModelError(f"{config.path}: {key} is not supported")
    return name, ARCHITECTURES[name]


def _linear_specs(
    config: _Config,
    architecture: _Architecture,
    quantization: Quantization,
    hidden: int,
    shared: Mapping[str, Any],
) -> dict[str, Any]:
    queries = shared["num_heads"] * shared["head_dim"]
    keys = shared["num_kv_heads"] * shared["head_dim"]
    ffn = config.size("intermediate_size")
    shapes = {
        "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
        "gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn),
    }  # fmt: skip
    biased = set(architecture.bias)
    for key, names in architecture.bias_keys:
        if config.switch(key):
            biased |= names
    return {
        name: LinearSpec(
            *shapes[name],
            norm_eps=quantization.norm_eps,
            bias=name in biased,
        )
        for name in LINEAR_NAMES
    }


def _read_rope(
    config: _Config, architecture: _Architecture, head_dim: int, max_context: int
) -> RopeSpec:
    """Read RoPE from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta`."""
    section = config.section("rope_parameters") or config.section("rope_scaling")
    section = section or _Config(config.path, {})
    theta = section.positive("rope_theta", config.positive("rope_theta", architecture.rope_theta))
    partial = section.positive(
        "partial_rotary_factor", config.positive("partial_rotary_factor", 1.0)
    )
    kind = section.text("rope_type", section.text("type", "default"))
    factor = section.positive("factor", 1.0)
    try:
        if kind in ("default", "none") or (kind == "linear" and factor == 1.0):
            return RopeSpec(theta, int(head_dim * partial))
        if kind == "linear":
            return RopeSpec(theta, int(head_dim * partial), "linear", factor)
        if kind == "llama3":
            return RopeSpec(
                theta,
                int(head_dim * partial),
                "llama3",
                factor,
                section.positive("low_freq_factor", 1.0),
                section.positive("high_freq_factor", 4.0),
                section.size("original_max_position_embeddings", max_context),
            )
    except ConfigError as error:
        raise FormatError(f"{config.path}: {error.message}", hint=error.hint) from error
    raise UnsupportedModelError(
        f"{config.path}: the RoPE scaling {kind!r} is not supported",
        hint="supported are default, linear and llama3",
    )


def _sliding_windows(
    config: _Config, architecture: _Architecture, count: int, max_context: int
) -> list[int | None]:
    """Return the attention window of each layer, None = the whole context."""
    off: list[int | None] = [None] * count
    switched_off = architecture.sliding == "switched" and not config.switch("use_sliding_window")
    if architecture.sliding == "never" or switched_off or config.get("sliding_window") is None:
        return off
    window = config.size("sliding_window")
    if window >= max_context:
        return off
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers") if architecture.sliding == "switched" else 0
        first = 28 if first is None else first
        return [window if type(first) is int and layer >= first else None for layer in range(count)]
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(kinds, list) or len(kinds) != count or not set(map(str, kinds)) <= set(known):
        raise config.fail("layer_types", f"a list of {count} of {', '.join(known)}")
    return [known[str(kind)] for kind in kinds]
