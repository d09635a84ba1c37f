"""The canonical checkpoint: what every format is read into and every backend loads from. Data only.

A `Checkpoint` is a `ModelSpec` (the architecture, read from the files and never guessed from a
name) and a `TensorSource` that yields one canonical tensor at a time, so that loading a model
needs the memory of the model plus one tensor.

Canonical tensor names
    embed                      DenseTensor [vocab, hidden]
    head                       DenseTensor [vocab, hidden]; absent when `ModelSpec.tied_head`
    final_norm                 DenseTensor [hidden]
    layers.N.attn_norm         DenseTensor [hidden]        before q, k, v (absent: no such norm)
    layers.N.ffn_norm          DenseTensor [hidden]        before gate, up
    layers.N.attn_sub_norm     DenseTensor [heads * head_dim]   before o
    layers.N.ffn_sub_norm      DenseTensor [ffn]           before down
    layers.N.q_norm, .k_norm   DenseTensor [head_dim]      on each head, before RoPE
    layers.N.post_attn_norm    DenseTensor [hidden]        on o's output, before the residual add
    layers.N.post_ffn_norm     DenseTensor [hidden]        on down's output, before the residual add
    layers.N.{q,k,v,o,gate,up,down}          TernaryMatrix [out, in]
    layers.N.{q,...}.norm      DenseTensor [in]    RMSNorm of this linear's own input, before it is
                                                   quantised
    layers.N.{q,...}.bias      DenseTensor [out]
A gain stored as (gain - 1) is turned into the plain gain by the reader.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from bitllm.errors import ConfigError, MissingTensorError, TensorShapeError
from bitllm.ternary import pack, unpack

__all__ = [
    "DTYPE_BYTES",
    "LINEAR_NAMES",
    "Activation",
    "Checkpoint",
    "DenseDtype",
    "DenseTensor",
    "LayerSpec",
    "LinearSpec",
    "MappedSource",
    "ModelSpec",
    "RopeSpec",
    "ScaleConvention",
    "StridedMatrix",
    "TensorSource",
    "TernaryMatrix",
    "WeightScales",
]

LINEAR_NAMES = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven ternary projections of a layer, in the order they are stored and loaded."""

Activation = Literal["relu2", "silu", "gelu_tanh"]
DenseDtype = Literal["f32", "bf16", "f16"]
DTYPE_BYTES: Mapping[DenseDtype, int] = {"f32": 4, "bf16": 2, "f16": 2}
"""Bytes of a value, by the dtype of a dense tensor."""
ScaleConvention = Literal["multiply", "divide"]


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A floating-point tensor as stored: `data` is float32, float16, or uint16 holding bf16 bits.

    `data` may be a read-only view of a mapped file; whoever keeps it keeps the mapping alive.
    """

    data: npt.NDArray[np.generic]
    dtype: DenseDtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the values as stored."""
        return self.data.nbytes

    def to_float32(self) -> npt.NDArray[np.float32]:
        """Return the values as float32 [same shape]; exact for each of the three dtypes."""
        if self.dtype == "bf16":
            widened = self.data.astype(np.uint32) << np.uint32(16)
            return widened.view(np.float32)
        return np.asarray(self.data, dtype=np.float32, order="C")


@dataclass(frozen=True, slots=True)
class TernaryMatrix:
    """A ternary weight matrix [out, in] in the canonical packing.

    `packed` is uint8 [out, ceil(in / 4)]: element k of a row is bits 2(k % 4) of byte k // 4 and
    holds code + 1 (0, 1 or 2); padding positions hold 1, a zero weight.
    `scales` is float32 and *multiplies*: shape () for one scale, [out] for one a row,
    [out, ceil(in / group_size)] for groups along `in`.
    `source_scales` keeps what the file stored (its bits and its convention), so that writing back
    is byte-exact; `source_scales.to_float32()` equals `scales`, or 1 / `scales` where the
    convention is "divide".
    """

    packed: npt.NDArray[np.uint8]
    in_features: int
    scales: npt.NDArray[np.float32]
    group_size: int | None = None
    source_scales: DenseTensor | None = None
    source_convention: ScaleConvention = "multiply"

    def __post_init__(self) -> None:
        if self.packed.dtype != np.uint8 or self.packed.ndim != 2:
            raise ConfigError(
                f"packed must be uint8 [out, in / 4], got {self.packed.dtype} {self.packed.shape}"
            )
        row_bytes = -(-self.in_features // 4)
        if self.packed.shape[1] != row_bytes:
            raise ConfigError(
                f"packed has {self.packed.shape[1]} bytes a row, "
                f"in_features {self.in_features} needs {row_bytes}"
            )
        groups = None if self.group_size is None else -(-self.in_features // self.group_size)
        wanted = [(), (self.out_features,)] if groups is None else [(self.out_features, groups)]
        if self.scales.dtype != np.float32 or self.scales.shape not in wanted:
            raise ConfigError(
                f"scales must be float32 of shape {' or '.join(map(str, wanted))}, "
                f"got {self.scales.dtype} {self.scales.shape}"
            )

    @classmethod
    def from_codes(
        cls,
        codes: npt.NDArray[np.int8],
        scales: npt.NDArray[np.float32],
        group_size: int | None = None,
        *,
        source_scales: DenseTensor | None = None,
        source_convention: ScaleConvention = "multiply",
    ) -> TernaryMatrix:
        """Pack int8 codes [out, in]; the other arguments are the fields of the same name.

        Raises:
            QuantizationError: a code outside {-1, 0, +1}.
            ConfigError: `scales` of another shape or dtype than the codes need.
        """
        packed = pack(codes)
        return cls(packed, codes.shape[1], scales, group_size, source_scales, source_convention)

    def codes(self) -> npt.NDArray[np.int8]:
        """Unpack the codes, int8 [out, in], each -1, 0 or +1.

        Raises:
            QuantizationError: the packed bytes hold the code 3; names the row.
        """
        return unpack(self.packed, self.in_features)

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return int(self.packed.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.packed.nbytes + self.scales.nbytes


@dataclass(frozen=True, slots=True)
class WeightScales:
    """The scales of a `TernaryMatrix` without its codes; fields as there."""

    scales: npt.NDArray[np.float32]
    group_size: int | None = None
    source_scales: DenseTensor | None = None
    source_convention: ScaleConvention = "multiply"


@dataclass(frozen=True, slots=True)
class StridedMatrix:
    """A ternary matrix [out, in] left as transformers writes it, for backends that convert it.

    `stored` is uint8 [ceil(out / 4), in], as a rule a view of a mapped file: bits 2i of
    stored[r, k] hold code + 1 of element (r + i * ceil(out / 4), k). Nobody has looked at them yet:
    they may hold the code 3, which a backend must refuse. `scales` is float32 () and multiplies.
    """

    stored: npt.NDArray[np.uint8]
    out_features: int
    scales: npt.NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, int(self.stored.shape[1])


_LARGEST_CONTEXT = 2**53


def _all_positive(values: npt.NDArray[np.float32]) -> bool:
    return bool((np.isfinite(values) & (values > 0)).all())


def _check_epsilon(eps: float) -> None:
    """Refuse an epsilon that is negative, no number, or not zero but lost in float32."""
    with np.errstate(all="ignore"):
        held = np.float32(eps)
    if not (np.isfinite(held) and eps >= 0 and (held > 0 or eps == 0)):
        raise ConfigError(
            f"norm_eps must be 0 or a positive number that float32 holds, got {eps}",
            hint="models use 1e-6 to 1e-5",
        )


def _check_finite(name: str, value: float) -> None:
    with np.errstate(all="ignore"):
        held = np.float32(value)
    if not np.isfinite(held):
        raise ConfigError(f"{name} must be a number that float32 holds, got {value}")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding, rotate-half style, over the first `dim` of a head.

    `scaling` "linear" divides every frequency by `factor`; "llama3" blends as Llama 3.1 does,
    between `low_freq_factor` and `high_freq_factor` wavelengths of `original_context`. "yarn"
    (Peng et al., 2023) divides those that turn less than `beta_slow` times within that context,
    keeps those that turn more than `beta_fast` times, and blends between; what it does to the
    scores belongs to `LayerSpec.query_scale`.
    """

    theta: float
    dim: int
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % 2:
            raise ConfigError(f"RoPE needs an even, positive number of dimensions, got {self.dim}")
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise ConfigError(f"rope_theta must be a positive number, got {self.theta}")
        if self.scaling == "llama3":
            self._check_llama3()
        if self.scaling == "yarn":
            self._check_yarn()
        # All frequencies lie between those of the first and the last pair, divided or not.
        ends = np.array([0, self.dim - 2], np.float64) / self.dim
        with np.errstate(all="ignore"):
            plain = self._plain_frequencies(ends)
            divided = plain / np.float32(self.factor)
        if not _all_positive(plain):
            raise ConfigError(
                f"rope_theta {self.theta} gives frequencies that float32 cannot hold",
                hint="models use 10000 to some millions",
            )
        if self.scaling != "none" and not _all_positive(divided):
            raise ConfigError(
                f"the RoPE factor {self.factor} gives frequencies that are not positive numbers",
                hint="models use 1 to 128",
            )

    def _check_llama3(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if not (0 < low < high and math.isfinite(high)):
            raise ConfigError(
                f"RoPE of llama3 needs 0 < low_freq_factor < high_freq_factor, got {low} and {high}"
            )
        self._check_original_context()

    def _check_yarn(self) -> None:
        slow, fast = self.beta_slow, self.beta_fast
        if not (0 < slow < fast and math.isfinite(fast) and self.theta > 1):
            raise ConfigError(
                "RoPE of yarn needs 0 < beta_slow < beta_fast and a base above 1, "
                f"got {slow}, {fast} and {self.theta}"
            )
        self._check_original_context()

    def _check_original_context(self) -> None:
        if not 0 < self.original_context <= _LARGEST_CONTEXT:
            raise ConfigError(
                f"RoPE needs an original context of 1 to {_LARGEST_CONTEXT} tokens, "
                f"got {self.original_context!r:.30}"
            )

    def inverse_frequencies(self) -> npt.NDArray[np.float32]:
        """Return float32 [dim / 2] radians per position; the angle is their fp32 product."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float64) / self.dim
        frequencies = self._plain_frequencies(exponents)
        if self.scaling == "linear":
            frequencies = (frequencies / np.float32(self.factor)).astype(np.float32)
        elif self.scaling == "llama3":
            frequencies = self._llama3(frequencies)
        elif self.scaling == "yarn":
            frequencies = self._yarn(frequencies)
        return frequencies

    def _plain_frequencies(self, exponents: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        # float32 before the reciprocal, as transformers does, so that angles agree to the bit.
        return (1.0 / (self.theta**exponents).astype(np.float32)).astype(np.float32)

    def _llama3(self, frequencies: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        wavelengths = 2 * math.pi / frequencies.astype(np.float64)
        low = self.original_context / self.low_freq_factor
        high = self.original_context / self.high_freq_factor
        span = self.high_freq_factor - self.low_freq_factor
        smooth = (self.original_context / wavelengths - self.low_freq_factor) / span
        smooth = np.clip(smooth, 0.0, 1.0)
        blended = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        short_or_blended = np.where(wavelengths < high, frequencies, blended)
        scaled = np.where(wavelengths > low, frequencies / self.factor, short_or_blended)
        return scaled.astype(np.float32)

    def _yarn(self, frequencies: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        low = max(math.floor(self._pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(self._pair_that_turns(self.beta_slow)), self.dim - 1)
        width = high - low or 0.001
        pairs = np.arange(self.dim // 2, dtype=np.float64)
        divided = np.clip((pairs - low) / width, 0.0, 1.0)
        blended = frequencies / self.factor * divided + frequencies * (1 - divided)
        return blended.astype(np.float32)

    def _pair_that_turns(self, times: float) -> float:
        """The pair of dimensions, as a fraction, that turns so often in the original context."""
        wavelengths = self.original_context / (times * 2 * math.pi)
        return self.dim * math.log(wavelengths) / (2 * math.log(self.theta))


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One ternary projection: y = scale * (codes @ quantise(norm(x))) + bias.

    `norm_eps` is the epsilon of this linear's own input RMSNorm (tensor `<name>.norm`), or None
    when it reads the input it shares with its siblings. `activation_bits` is 8, or None for a
    model whose activations are not quantised.
    """

    out_features: int
    in_features: int
    norm_eps: float | None = None
    bias: bool = False
    activation_bits: Literal[8] | None = 8

    def __post_init__(self) -> None:
        if self.norm_eps is not None:
            _check_epsilon(self.norm_eps)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The switches of one decoder layer.

    a = attention(q, k, v of attn_norm(h));   h += post_attn_norm(o(attn_sub_norm(a)))
    f = act(gate(x)) * up(x), x = ffn_norm(h); h += post_ffn_norm(down(ffn_sub_norm(f)))
    """

    q: LinearSpec
    k: LinearSpec
    v: LinearSpec
    o: LinearSpec
    gate: LinearSpec
    up: LinearSpec
    down: LinearSpec
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    activation: Activation
    norm_eps: float
    query_scale: float
    attn_norm: bool = True
    ffn_norm: bool = True
    attn_sub_norm: bool = False
    ffn_sub_norm: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        smallest = min(self.num_heads, self.num_kv_heads, self.head_dim)
        if smallest <= 0 or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} KV heads "
                f"(head_dim {self.head_dim})"
            )
        if self.rope.dim > self.head_dim:
            raise ConfigError(
                f"RoPE turns {self.rope.dim} dimensions of a head that has {self.head_dim}"
            )
        _check_epsilon(self.norm_eps)
        _check_finite("query_scale", self.query_scale)

    def linear(self, name: str) -> LinearSpec:
        """Return the projection called `name`, one of `LINEAR_NAMES`."""
        spec: LinearSpec = getattr(self, name)
        return spec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The architecture of a whole model. `norm_eps` belongs to the final norm.

    logits = head(final_norm(h)), h = embed[token] * embedding_scale through all layers.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    tied_head: bool
    max_context: int
    embedding_scale: float = 1.0
    pooling: Literal["none", "last"] = "none"

    def __post_init__(self) -> None:
        _check_epsilon(self.norm_eps)
        _check_finite("embedding_scale", self.embedding_scale)

    def linear_names(self) -> Iterator[tuple[str, LinearSpec]]:
        """Yield the canonical name and spec of every ternary matrix, layer by layer."""
        for index, layer in enumerate(self.layers):
            for name in LINEAR_NAMES:
                yield f"layers.{index}.{name}", layer.linear(name)

    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the canonical name and shape of every dense tensor this architecture has."""
        shapes = self._model_tensors()
        for index, layer in enumerate(self.layers):
            for name, size in self._layer_vectors(layer).items():
                shapes[f"layers.{index}.{name}"] = (size,)
        return shapes

    def dense_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of the dense tensor called `name`, None if there is no such tensor."""
        prefix, _, rest = name.partition(".")
        index, _, vector = rest.partition(".")
        if prefix != "layers" or not index.isdecimal() or int(index) >= len(self.layers):
            return self._model_tensors().get(name)
        size = self._layer_vectors(self.layers[int(index)]).get(vector)
        return None if size is None else (size,)

    def _model_tensors(self) -> dict[str, tuple[int, ...]]:
        matrix = (self.vocab_size, self.hidden_size)
        heads = {} if self.tied_head else {"head": matrix}
        return {"embed": matrix, **heads, "final_norm": (self.hidden_size,)}

    def _layer_vectors(self, layer: LayerSpec) -> dict[str, int]:
        """Name and length of the norms and biases that one layer has."""
        optional = {
            "attn_norm": (layer.attn_norm, self.hidden_size),
            "ffn_norm": (layer.ffn_norm, self.hidden_size),
            "attn_sub_norm": (layer.attn_sub_norm, layer.o.in_features),
            "ffn_sub_norm": (layer.ffn_sub_norm, layer.down.in_features),
            "q_norm": (layer.qk_norm, layer.head_dim),
            "k_norm": (layer.qk_norm, layer.head_dim),
            "post_attn_norm": (layer.post_norms, self.hidden_size),
            "post_ffn_norm": (layer.post_norms, self.hidden_size),
        }
        for name in LINEAR_NAMES:
            linear = layer.linear(name)
            optional[f"{name}.norm"] = (linear.norm_eps is not None, linear.in_features)
            optional[f"{name}.bias"] = (linear.bias, linear.out_features)
        return {name: size for name, (present, size) in optional.items() if present}

    def parameter_count(self) -> int:
        """Return the number of weights, a tied head counted once."""
        dense = sum(math.prod(shape) for shape in self.dense_shapes().values())
        return dense + sum(spec.out_features * spec.in_features for _, spec in self.linear_names())


class TensorSource(Protocol):
    """Where canonical tensors come from: one file format each."""

    def dense(self, name: str) -> DenseTensor | None:
        """Return the dense tensor called `name`, or None if the source has none."""

    def ternary(self, name: str) -> TernaryMatrix | None:
        """Read and convert the ternary matrix called `name`, or None; nothing is cached."""


class MappedSource(ABC):
    """A `TensorSource` over mapped files, some of whose matrices a backend may convert itself."""

    @abstractmethod
    def dense(self, name: str) -> DenseTensor | None:
        """Return the dense tensor called `name`, or None if the source has none."""

    @abstractmethod
    def ternary(self, name: str) -> TernaryMatrix | None:
        """Read and convert the ternary matrix called `name`, or None; nothing is cached."""

    @abstractmethod
    def strided(self, name: str) -> StridedMatrix | None:
        """Return a view of the matrix called `name` if it is stored so, else None."""

    def scales(self, name: str) -> WeightScales | None:
        """Return the scales of the matrix called `name` if they can be had without its codes."""
        return None

    def dense_dtype(self, name: str) -> DenseDtype | None:
        """Return the dtype of the dense tensor called `name`, or None; decodes nothing."""
        tensor = self.dense(name)
        return None if tensor is None else tensor.dtype

    def is_mapped(self, name: str) -> bool:
        """Whether the dense tensor called `name` is a view of a file; if not, it takes memory."""
        return True

    @abstractmethod
    def release(self) -> None:
        """Drop from memory what was read of the files; it is read again where it is used again."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model ready to be loaded by a backend: its architecture and its tensors, one at a time."""

    spec: ModelSpec
    source: TensorSource
    origin: str

    def dense(self, name: str) -> DenseTensor:
        """Return the dense tensor called `name`.

        Raises:
            MissingTensorError: the checkpoint has no such tensor.
            TensorShapeError: its shape is not the one the architecture asks for.
        """
        tensor = self.source.dense(name)
        if tensor is None:
            raise self._missing(name)
        self._check_shape(name, tensor.shape, self.spec.dense_shape(name))
        return tensor

    def dense_dtype(self, name: str) -> DenseDtype:
        """Return the dtype of the dense tensor called `name`, without decoding its values.

        Raises:
            MissingTensorError: the checkpoint has no such tensor.
        """
        source = self.source
        found = source.dense_dtype(name) if isinstance(source, MappedSource) else None
        return found or self.dense(name).dtype

    def is_mapped(self, name: str) -> bool:
        """Whether the dense tensor called `name` is a view of a file, which takes no memory."""
        return not isinstance(self.source, MappedSource) or self.source.is_mapped(name)

    def ternary(self, name: str) -> TernaryMatrix:
        """Read the ternary matrix called `name` into the canonical packing.

        Raises:
            MissingTensorError: the checkpoint has no such tensor.
            TensorShapeError: its shape is not the one the architecture asks for.
        """
        matrix = self.source.ternary(name)
        if matrix is None:
            raise self._missing(name)
        self._check_shape(name, matrix.shape, self._linear_shape(name))
        return matrix

    def strided(self, name: str) -> StridedMatrix | None:
        """Return the ternary matrix called `name` as it is mapped, None if it has to be converted.

        Raises:
            TensorShapeError: its shape is not the one the architecture asks for.
        """
        source = self.source
        matrix = source.strided(name) if isinstance(source, MappedSource) else None
        if matrix is not None:
            self._check_shape(name, matrix.shape, self._linear_shape(name))
        return matrix

    def scales(self, name: str) -> WeightScales:
        """Return the scales of the ternary matrix called `name`; its codes are read only if needed.

        Raises:
            MissingTensorError: the checkpoint has no such tensor.
            TensorShapeError: its shape is not the one the architecture asks for.
        """
        source = self.source
        found = source.scales(name) if isinstance(source, MappedSource) else None
        if found is not None:
            return found
        matrix = self.ternary(name)
        self.release()
        return WeightScales(
            matrix.scales, matrix.group_size, matrix.source_scales, matrix.source_convention
        )

    def release(self) -> None:
        """Drop from memory what was read of mapped files; views of them stay valid."""
        if isinstance(self.source, MappedSource):
            self.source.release()

    def _linear_shape(self, name: str) -> tuple[int, int]:
        _, index, linear = name.split(".")
        spec = self.spec.layers[int(index)].linear(linear)
        return spec.out_features, spec.in_features

    def _check_shape(
        self, name: str, shape: tuple[int, ...], wanted: tuple[int, ...] | None
    ) -> None:
        if wanted is not None and shape != wanted:
            raise TensorShapeError(
                f"{self.origin}: tensor {name!r} has shape {list(shape)}, "
                f"but the configuration asks for {list(wanted)}",
                hint="check that config.json belongs to these weights",
            )

    def _missing(self, name: str) -> MissingTensorError:
        return MissingTensorError(
            f"{self.origin}: tensor {name!r} is missing",
            hint="download the model again, or check that config.json belongs to these weights",
        )
