"""The metadata of a GGUF file, read into a `ModelSpec`.

Numbers come from the keys of the architecture, norms and biases from the presence of their
tensors, and what no key says (the activation, the order of q and k) from the architecture's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from bitllm.checkpoint import LINEAR_NAMES, LayerSpec, LinearSpec, ModelSpec, RopeSpec
from bitllm.errors import ConfigError, FormatError, UnsupportedModelError
from bitllm.formats.gguf.container import GgufArray
from bitllm.formats.gguf.names import (
    ACTIVATION_BITS,
    ARCHITECTURES,
    REFUSED_ARCHITECTURES,
    REFUSED_KEYS,
    GgufArchitecture,
    stored_name,
)
from bitllm.formats.gguf.rope import ROPE_FREQS, read_rope
from bitllm.formats.gguf.shards import GgufModel

__all__ = ["gguf_architecture", "read_gguf_spec"]

_MAX_LAYERS = 10_000
_MAX_WIDTH = 1 << 30
_FLOAT_ACTIVATIONS = ("Q2_0", "Q2_0_G128", "PTQ1_0")
_MEAN, _LAST = 1, 3  # of pooling_type
_OPTIONAL_NORMS = ("attn_norm", "ffn_norm", "attn_sub_norm", "ffn_sub_norm")


class _Keys:
    """The metadata of an architecture with typed access; every failure names the file and key."""

    def __init__(self, model: GgufModel, architecture: str) -> None:
        self._model, self._architecture = model, architecture
        # Some converters write the keys under the name that the architecture had before.
        prefixes = [architecture, *ARCHITECTURES]
        self._prefix = next(
            (name for name in prefixes if f"{name}.block_count" in model.metadata), architecture
        )

    def get(self, key: str) -> Any:
        return self._model.metadata.get(f"{self._prefix}.{key}")

    def fail(self, key: str, wanted: str) -> FormatError:
        name = f"{self._model.path}: {self._prefix}.{key}"
        return FormatError(f"{name} should be {wanted}, got {self.get(key)!r:.80}")

    def size(self, key: str, default: int | None = None, most: int = _MAX_WIDTH) -> int:
        """A positive whole number, one for all layers; a key without default must be there."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise FormatError(
                f"{self._model.path}: the metadata lack {self._prefix}.{key}",
                hint="the file was written by a broken converter; convert the model again",
            )
        if isinstance(value, GgufArray):
            values = {*np.asarray(self._model.values(f"{self._prefix}.{key}")).tolist()}
            if len(values) != 1:
                raise UnsupportedModelError(
                    f"{self._model.path}: {self._prefix}.{key} differs from layer to layer, "
                    "which is not supported"
                )
            value = values.pop()
        if type(value) is not int or not 0 < value <= most:
            raise self.fail(key, f"a whole number from 1 to {most}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.fail(key, "a positive number")
        # The file holds a float32: 1e-5 was meant where it says 9.99999974738e-06.
        return float(str(np.float32(value)))


def gguf_architecture(model: GgufModel) -> GgufArchitecture:
    """Return what the architecture of a model implies.

    Raises:
        UnsupportedModelError: it is not run; names the reason.
        FormatError: the file names none.
    """
    name = model.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise FormatError(
            f"{model.path}: the metadata lack general.architecture",
            hint="the file holds no language model, or was written by a broken converter",
        )
    if name not in ARCHITECTURES:
        reason = REFUSED_ARCHITECTURES.get(name)
        raise UnsupportedModelError(
            f"{model.path}: architecture {name!r:.60} is not supported"
            + (f" ({reason})" if reason else ""),
            hint=f"supported are {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[name]


def read_gguf_spec(model: GgufModel) -> ModelSpec:
    """Read the architecture of a model from its metadata and the names of its tensors.

    Raises:
        UnsupportedModelError: an architecture or a feature that the decoders do not have.
        FormatError: a key is missing or has an impossible value.
    """
    architecture = gguf_architecture(model)
    name: str = model.metadata["general.architecture"]
    keys = _Keys(model, name)
    _refuse_features(model, keys)
    count = keys.size("block_count", most=_MAX_LAYERS)
    embed = model.tensors.get(stored_name("embed"))
    if embed is None or len(embed.shape) != 2:
        raise FormatError(
            f"{model.path}: no matrix {stored_name('embed')}",
            hint="the file holds no whole model: a part of one, an adapter or an image encoder",
        )
    try:
        layers = _read_layers(model, keys, architecture, count)
        return ModelSpec(
            architecture=name,
            vocab_size=embed.shape[0],
            hidden_size=keys.size("embedding_length"),
            layers=layers,
            norm_eps=layers[0].norm_eps,
            tied_head=stored_name("head") not in model.tensors,
            max_context=keys.size("context_length"),
            pooling=_pooling(model, keys, layers[0]),
        )
    except ConfigError as error:
        raise FormatError(f"{model.path}: {error.message}", hint=error.hint) from error


def _pooling(model: GgufModel, keys: _Keys, layer: LayerSpec) -> Literal["none", "last"]:
    """Return how embeddings are made: of the last token, or not at all.

    For the BitNet embedding models, which have a norm before each projection, a converter writes
    the mean; they were trained for the last token.
    """
    stated = keys.get("pooling_type")
    if stated == _MEAN and layer.q.norm_eps is not None:
        return "last"
    if stated not in (None, 0, _LAST):
        raise UnsupportedModelError(
            f"{model.path}: pooling of type {stated!r:.20} is not supported",
            hint="models of text and embeddings of the last token are",
        )
    return "last" if stated == _LAST else "none"


def _refuse_features(model: GgufModel, keys: _Keys) -> None:
    for key, feature in REFUSED_KEYS.items():
        value = keys.get(key)
        harmless = (None, 0, False, 1.0) if key.endswith("_scale") else (None, 0, False)
        if value not in harmless:
            raise UnsupportedModelError(f"{model.path}: {feature} is not supported")
    experts = [name for name in model.tensors if "_exps." in name or "ffn_gate_inp" in name]
    if experts:
        raise UnsupportedModelError(
            f"{model.path}: a mixture of experts ({experts[0]!r:.60}) is not supported"
        )


def _read_layers(
    model: GgufModel, keys: _Keys, architecture: GgufArchitecture, count: int
) -> tuple[LayerSpec, ...]:
    heads = keys.size("attention.head_count", most=65_536)
    hidden = keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", max(1, hidden // heads), 65_536)
    if keys.size("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{model.path}: values with another head size than keys are not supported"
        )
    shared: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": keys.size("attention.head_count_kv", heads, 65_536),
        "head_dim": head_dim,
        "rope": _read_rope(model, keys, head_dim),
        "activation": architecture.activation,
        "norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "query_scale": 1.0 / math.sqrt(head_dim),
    }
    shapes = _linear_shapes(keys, shared)
    bits = _activation_bits(model)
    known: dict[tuple[str, ...], LayerSpec] = {}
    layers = []
    for index in range(count):
        present = _present(model, index)
        if present not in known:
            known[present] = _layer(present, shapes, shared, bits)
        layers.append(known[present])
    return tuple(layers)


def _present(model: GgufModel, index: int) -> tuple[str, ...]:
    """Return which of the optional tensors of a layer are there, by their canonical names."""
    optional = [*_OPTIONAL_NORMS, "q_norm", "k_norm"]
    optional += [f"{name}.{part}" for name in LINEAR_NAMES for part in ("norm", "bias")]
    return tuple(
        name for name in optional if stored_name(f"layers.{index}.{name}") in model.tensors
    )


def _layer(
    present: tuple[str, ...],
    shapes: Mapping[str, tuple[int, int]],
    shared: Mapping[str, Any],
    bits: Literal[8] | None,
) -> LayerSpec:
    linears: dict[str, Any] = {
        name: LinearSpec(
            *shapes[name],
            norm_eps=shared["norm_eps"] if f"{name}.norm" in present else None,
            bias=f"{name}.bias" in present,
            activation_bits=bits,
        )
        for name in LINEAR_NAMES
    }
    norms: dict[str, Any] = {name: name in present for name in _OPTIONAL_NORMS}
    return LayerSpec(**linears, **shared, **norms, qk_norm="q_norm" in present)


def _linear_shapes(keys: _Keys, shared: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    hidden, ffn = keys.size("embedding_length"), keys.size("feed_forward_length")
    queries = shared["num_heads"] * shared["head_dim"]
    values = shared["num_kv_heads"] * shared["head_dim"]
    return {
        "q": (queries, hidden), "k": (values, hidden), "v": (values, hidden),
        "o": (hidden, queries),
        "gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn),
    }  # fmt: skip


def _read_rope(model: GgufModel, keys: _Keys, head_dim: int) -> RopeSpec:
    theta = keys.positive("rope.freq_base", 10_000.0)
    dim = keys.size("rope.dimension_count", head_dim)
    if ARCHITECTURES[model.metadata["general.architecture"]].permuted and dim != head_dim:
        raise UnsupportedModelError(
            f"{model.path}: RoPE over {dim} of {head_dim} dimensions is not supported in an "
            "architecture whose rows are reordered for it"
        )
    kind = keys.get("rope.scaling.type") or "none"
    factor = keys.positive("rope.scaling.factor", keys.positive("rope.scale_linear", 1.0))
    if kind == "none" or factor == 1.0:
        kind, factor = "none", 1.0
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(
            f"{model.path}: the RoPE scaling {kind!r:.40} is not supported",
            hint="supported are none, linear and that of Llama 3 (rope_freqs.weight)",
        )
    if ROPE_FREQS not in model.tensors:
        return RopeSpec(theta, dim, "linear" if kind == "linear" else "none", factor)
    return read_rope(model, theta, dim)


def _activation_bits(model: GgufModel) -> Literal[8] | None:
    """Return how the activations of the projections are quantised; no key of the format says it.

    BitNet models quantise them to int8. Models whose weights alone are ternary do not: the ones of
    the group types (Bonsai), and TriLM, which has nothing but its name to be told by.
    """
    stated = model.metadata.get(ACTIVATION_BITS)
    if stated in (0, 8):
        return 8 if stated else None
    if stated is not None:
        raise UnsupportedModelError(
            f"{model.path}: activations of {stated!r:.20} bits are not supported"
        )
    matrix = model.tensors.get(stored_name("layers.0.up"))
    name = f"{model.metadata.get('general.name')} {model.metadata.get('general.basename')}"
    if (matrix and matrix.type.name in _FLOAT_ACTIVATIONS) or "trilm" in name.lower():
        return None
    return 8
