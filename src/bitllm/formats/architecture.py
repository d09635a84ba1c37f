"""config.json of Hugging Face models, read into a `ModelSpec`.

The decoders know one family of layers with switches; each supported architecture is an entry of
`ARCHITECTURES` that says how its configuration sets them. Keys that no entry reads are ignored, as
transformers ignores them; features that would change the result are refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
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
from bitllm.errors import ConfigError, FormatError, UnsupportedModelError
from bitllm.formats.config_fields import ConfigFields
from bitllm.formats.quantization import Quantization
from bitllm.formats.refusals import unknown_architecture

__all__ = ["ARCHITECTURES", "read_model_spec"]

_MAX_LAYERS = 10_000
_ACTIVATIONS: Mapping[str, Activation] = {
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What transformers' class of this name does where config.json is silent, and what it fixes.

    `bias` names the projections that have a bias whatever the configuration says; `bias_keys` maps
    a key of config.json to the projections whose bias it switches. `sliding` says how the
    configuration asks for sliding-window attention: where "by pattern", all layers have it but
    every sixth. `local_theta` is the RoPE base of layers with a window, if they have their own.
    `post_norms` are norms behind the blocks; `gain_offset` is added to the stored gains of norms;
    `query_scalar` stands for the head size in 1 / sqrt(head size), the query scale; and
    `scaled_embedding` multiplies the embedding by sqrt(hidden size). `tied` is whether the head is
    the embedding, None = the files show it.
    """

    hidden_act: str
    norm_eps: float
    rope_theta: float
    max_context: int
    head_dim: int | None = None
    act_key: str = "hidden_act"
    sub_norms: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    gain_offset: float = 0.0
    bias: frozenset[str] = frozenset()
    bias_keys: tuple[tuple[str, frozenset[str]], ...] = ()
    sliding: Literal["never", "always", "switched", "by pattern"] = "never"
    local_theta: float | None = None
    query_scalar: int | None = None
    scaled_embedding: bool = False
    tied: bool | None = None


_ATTENTION = frozenset({"q", "k", "v", "o"})
_FEED_FORWARD = frozenset({"gate", "up", "down"})
_ATTENTION_BIAS = (("attention_bias", _ATTENTION),)
_LLAMA_BIAS = (*_ATTENTION_BIAS, ("mlp_bias", _FEED_FORWARD))

_QWEN3 = _Architecture(
    "silu", 1e-6, 10_000.0, 32_768,
    head_dim=128, qk_norm=True, bias_keys=_ATTENTION_BIAS, sliding="switched",
)  # fmt: skip
_GEMMA3 = _Architecture(
    "gelu_pytorch_tanh", 1e-6, 1_000_000.0, 131_072,
    head_dim=256, act_key="hidden_activation", qk_norm=True, post_norms=True, gain_offset=1.0,
    bias_keys=_ATTENTION_BIAS, sliding="by pattern", local_theta=10_000.0, query_scalar=256,
    scaled_embedding=True, tied=True,
)  # fmt: skip

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
    "Qwen3ForCausalLM": _QWEN3,
    "Gemma3ForCausalLM": _GEMMA3,
    # Without a head: embedding models.
    "Qwen3Model": replace(_QWEN3, tied=True),
    "Gemma3TextModel": _GEMMA3,
}
"""The supported architectures, by their name in config.json."""

_UNSUPPORTED_KEYS = (
    "parallel_attn", "alibi", "use_bidirectional_attention", "attn_logit_softcapping",
    "final_logit_softcapping",
)  # fmt: skip
_GEMMA_PATTERN, _GEMMA_WINDOW = 6, 4096


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
    config = ConfigFields(path, fields)
    name, architecture = _find_architecture(config)
    hidden = config.size("hidden_size")
    count = config.size("num_hidden_layers", most=_MAX_LAYERS)
    max_context = config.size("max_position_embeddings", architecture.max_context)
    shared = _layer_switches(config, architecture, hidden, tensors)
    windows = _sliding_windows(config, architecture, count, max_context)
    try:
        linears = _linear_specs(config, architecture, quantization, hidden, shared)
        by_window = {}
        for window in set(windows):
            head_dim, local = shared["head_dim"], window is not None
            rope = _read_rope(config, architecture, head_dim, max_context, local)
            factor = _score_factor(config, architecture, rope, head_dim, local)
            by_window[window] = LayerSpec(
                **linears,
                **{**shared, "query_scale": shared["query_scale"] * factor},
                rope=rope,
                # A window as wide as the context is none.
                sliding_window=None if window is None or window >= max_context else window,
            )
    except ConfigError as error:
        raise FormatError(f"{path}: {error.message}", hint=error.hint) from error
    has_head = any(tensor.endswith("lm_head.weight") for tensor in tensors)
    tied = not has_head if architecture.tied is None else architecture.tied
    return ModelSpec(
        architecture=name,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        layers=tuple(by_window[window] for window in windows),
        norm_eps=shared["norm_eps"],
        tied_head=config.switch("tie_word_embeddings", tied),
        max_context=max_context,
        embedding_scale=math.sqrt(hidden) if architecture.scaled_embedding else 1.0,
    )


def _layer_switches(
    config: ConfigFields, architecture: _Architecture, hidden: int, tensors: Collection[str]
) -> dict[str, Any]:
    """The arguments of `LayerSpec` that all layers share, projections and RoPE left out."""
    act = config.text(architecture.act_key, architecture.hidden_act)
    if act not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{config.path}: the activation {act!r:.100} is not supported",
            hint=f"supported are {', '.join(_ACTIVATIONS)}",
        )
    heads = config.size("num_attention_heads", most=65_536)
    head_dim = config.size("head_dim", architecture.head_dim or max(1, hidden // heads), 65_536)
    query_scalar = float(head_dim)
    if architecture.query_scalar is not None:
        query_scalar = config.positive("query_pre_attn_scalar", architecture.query_scalar)
    sub_norms = architecture.sub_norms or any(
        tensor.endswith(("attn_sub_norm.weight", "inner_attn_ln.weight")) for tensor in tensors
    )
    return {
        "num_heads": heads,
        "num_kv_heads": config.size("num_key_value_heads", heads, 65_536),
        "head_dim": head_dim,
        "activation": _ACTIVATIONS[act],
        "norm_eps": config.positive("rms_norm_eps", architecture.norm_eps),
        "query_scale": 1.0 / math.sqrt(query_scalar),
        "attn_sub_norm": sub_norms,
        "ffn_sub_norm": sub_norms,
        "qk_norm": architecture.qk_norm,
        "post_norms": architecture.post_norms,
    }


def _find_architecture(config: ConfigFields) -> tuple[str, _Architecture]:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        name = names[0]
    else:
        kind = config.text("model_type", "").removesuffix("_text")
        name = next((key for key in ARCHITECTURES if key.lower() == f"{kind}forcausallm"), "")
    if name not in ARCHITECTURES:
        named = str(name or config.get("model_type"))[:100]
        raise unknown_architecture(config.path, config.fields, named, ARCHITECTURES)
    for key in _UNSUPPORTED_KEYS:
        if config.get(key):
            raise UnsupportedModelError(
                f"{config.path}: {key} is not supported",
                hint="the decoders compute attention of the Llama family",
            )
    return name, ARCHITECTURES[name]


def _linear_specs(
    config: ConfigFields,
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
            activation_bits=quantization.activation_bits,
        )
        for name in LINEAR_NAMES
    }


def _read_rope(
    config: ConfigFields,
    architecture: _Architecture,
    head_dim: int,
    max_context: int,
    local: bool,
) -> RopeSpec:
    """Read RoPE from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta`."""
    section, theta = _rope_section(config, architecture, local)
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
        if kind == "yarn":
            return _read_yarn(section, theta, int(head_dim * partial), factor, max_context)
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
        f"{config.path}: the RoPE scaling {kind!r:.100} is not supported",
        hint="supported are default, linear, llama3 and yarn",
    )


def _read_yarn(
    section: ConfigFields, theta: float, dim: int, factor: float, max_context: int
) -> RopeSpec:
    return RopeSpec(
        theta,
        dim,
        "yarn",
        factor,
        original_context=section.size("original_max_position_embeddings", max_context),
        beta_fast=section.positive("beta_fast", 32.0),
        beta_slow=section.positive("beta_slow", 1.0),
    )


def _score_factor(
    config: ConfigFields, architecture: _Architecture, rope: RopeSpec, head_dim: int, local: bool
) -> float:
    """What YaRN multiplies the attention scores by: its attention factor, of queries and keys."""
    if rope.scaling != "yarn":
        return 1.0
    section, _ = _rope_section(config, architecture, local)
    odd = [key for key in ("mscale", "mscale_all_dim") if section.get(key) is not None]
    odd += ["truncate"] if section.get("truncate") is False else []
    odd += ["partial_rotary_factor"] if rope.dim != head_dim else []
    if odd:
        raise UnsupportedModelError(
            f"{config.path}: RoPE of yarn with {' and '.join(odd)} is not supported",
            hint="supported are factor, beta_fast, beta_slow and attention_factor",
        )
    usual = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    return section.positive("attention_factor", usual) ** 2


def _rope_section(
    config: ConfigFields, architecture: _Architecture, local: bool
) -> tuple[ConfigFields, float]:
    """The scaling and the base; layers with a window may have a base of their own, and no scaling.

    transformers 5 writes one section for each kind of layer, older versions two keys.
    """
    section = config.section("rope_parameters") or config.section("rope_scaling")
    section = section or ConfigFields(config.path, {})
    theta = config.positive("rope_theta", architecture.rope_theta)
    own = local and architecture.local_theta is not None
    kinds = {True: "sliding_attention", False: "full_attention"}
    if own or any(kind in section.fields for kind in kinds.values()):
        section = section.section(kinds[local]) or ConfigFields(config.path, {})
    if own and architecture.local_theta is not None:
        theta = config.positive("rope_local_base_freq", architecture.local_theta)
    return section, section.positive("rope_theta", theta)


def _sliding_windows(
    config: ConfigFields, architecture: _Architecture, count: int, max_context: int
) -> list[int | None]:
    """Return the attention window of each layer, None = the whole context."""
    off: list[int | None] = [None] * count
    switched_off = architecture.sliding == "switched" and not config.switch("use_sliding_window")
    default = _GEMMA_WINDOW if architecture.sliding == "by pattern" else None
    unsaid = config.get("sliding_window") is None and default is None
    if architecture.sliding == "never" or switched_off or unsaid:
        return off
    window = config.size("sliding_window", default)
    kinds = config.get("layer_types")
    if kinds is None:
        return _windows_by_index(config, architecture, count, window)
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(kinds, list) or len(kinds) != count or not set(map(str, kinds)) <= set(known):
        raise config.fail("layer_types", f"a list of {count} of {', '.join(known)}")
    return [known[str(kind)] for kind in kinds]


def _windows_by_index(
    config: ConfigFields, architecture: _Architecture, count: int, window: int
) -> list[int | None]:
    if architecture.sliding == "by pattern":
        every = config.size("sliding_window_pattern", _GEMMA_PATTERN)
        return [None if (layer + 1) % every == 0 else window for layer in range(count)]
    first = config.get("max_window_layers") if architecture.sliding == "switched" else 0
    first = 28 if first is None else first
    return [window if type(first) is int and layer >= first else None for layer in range(count)]
