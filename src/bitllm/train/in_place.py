"""Any PyTorch model made a model of few bits, in place: its linear layers become `BitLinear`.

Modules and parameters stay the same objects under the same names, so that optimizers, checkpoints,
hooks and trainers that know the model go on knowing it. Nothing here knows what the model is.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from bitllm.errors import ConfigError
from bitllm.ternary import Baseline
from bitllm.train.bitlinear import BitLinear

__all__ = ["QuantizationReport", "dequantize_model", "quantize_model", "set_strength"]

_HEAD = "lm_head"

_Kind = TypeVar("_Kind", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What `quantize_model` did.

    Attributes:
        replaced: names of the modules that are `BitLinear` now.
        skipped: why a linear layer is not, by its name.
        quantized_parameters: weights that are quantised, shared ones counted once.
        parameters: all parameters of the model, shared ones counted once.
    """

    replaced: tuple[str, ...]
    skipped: Mapping[str, str]
    quantized_parameters: int
    parameters: int

    def __str__(self) -> str:
        share = 100 * self.quantized_parameters / max(self.parameters, 1)
        lines = [
            f"{len(self.replaced)} linear layers quantised: "
            f"{self.quantized_parameters:,} of {self.parameters:,} parameters ({share:.1f} %)"
        ]
        lines += [f"  left as it is: {name} ({reason})" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def quantize_model(
    model: nn.Module,
    skip: Sequence[str] = (_HEAD,),
    *,
    weight_bits: Baseline = "1.58",
    activation_bits: int | None = 8,
    norm_eps: float | None = None,
    strength: float | None = None,
) -> QuantizationReport:
    """Turn the linear layers of a model into `BitLinear`, in place.

    Left as they are: layers that `skip` names, layers whose weight an embedding shares (a tied
    head), and modules that only derive from `torch.nn.Linear`, whose forward is their own.

    Args:
        model: any module; its parameters keep identity, name, dtype and device.
        skip: names of modules, whole or their last parts, with `*` for anything; all modules
            inside a named one are left too.
        weight_bits: these and the following as for `BitLinear`. A norm is a new parameter: make
            the optimizer afterwards.
        activation_bits: see there.
        norm_eps: see there.
        strength: see there; `set_strength` changes it.

    Returns:
        What was replaced and what was not.

    Raises:
        ConfigError: a quantisation that is not offered, nothing to quantise, or a name in `skip`
            that no module has.
    """
    _check_names(model, skip)
    embeddings = {id(m.weight): name for name, m in _modules(model, nn.Embedding)}
    replaced, skipped = [], {}
    for name, linear in list(_modules(model, nn.Linear)):
        reason = _reason_to_skip(name, linear, skip, embeddings)
        if reason is not None:
            skipped[name] = reason
            continue
        BitLinear.adopt(
            linear,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            norm_eps=norm_eps,
            strength=strength,
        )
        replaced.append(name)
    if not replaced:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer to quantise",
            hint="; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or None,
        )
    weights = {id(m.weight): m.weight.numel() for _, m in _modules(model, BitLinear)}
    total = sum(parameter.numel() for parameter in model.parameters())
    return QuantizationReport(tuple(replaced), skipped, sum(weights.values()), total)


def dequantize_model(model: nn.Module, *, keep_masters: bool = False) -> tuple[str, ...]:
    """Turn every `BitLinear` of a model back into a `torch.nn.Linear`, in place.

    Args:
        model: what `quantize_model` was given.
        keep_masters: leave the master weights in the layers, which undoes `quantize_model`;
            otherwise they are overwritten with the rounded weights.

    Returns:
        The names of the layers.

    Raises:
        ConfigError: a layer has a norm of its own, which an ordinary layer has no place for.
    """
    layers = list(_modules(model, BitLinear))
    for name, layer in layers:
        if layer.rms_norm is not None:
            raise ConfigError(f"{name} has an input norm, which torch.nn.Linear has no place for")
    if not keep_masters:
        # Two layers may share a weight, which must not be rounded twice.
        with torch.no_grad():
            for layer in {id(layer.weight): layer for _, layer in layers}.values():
                layer.weight.copy_(layer.rounded_weight())
    for _, layer in layers:
        del layer.rms_norm, layer.strength, layer.weight_bits, layer.activation_bits
        layer.__class__ = nn.Linear  # type: ignore[assignment]
    return tuple(name for name, _ in layers)


def set_strength(model: nn.Module, strength: float) -> None:
    """Set how far all layers of a model are quantised, 0 (dense) to 1.

    Raises:
        ConfigError: not in 0 .. 1, or the layers were made without a strength.
    """
    for _, layer in _modules(model, BitLinear):
        layer.set_strength(strength)


def _modules(model: nn.Module, kind: type[_Kind]) -> Iterator[tuple[str, _Kind]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, kind))


def _reason_to_skip(
    name: str, linear: nn.Linear, skip: Sequence[str], embeddings: Mapping[int, str]
) -> str | None:
    pattern = next((pattern for pattern in skip if _matches(name, pattern)), None)
    if pattern is not None:
        return f"skip names {pattern!r}"
    if id(linear.weight) in embeddings:
        return f"tied to {embeddings[id(linear.weight)]}"
    if type(linear) is not nn.Linear and not isinstance(linear, BitLinear):
        return f"a {type(linear).__name__}, not torch.nn.Linear itself"
    if not linear.weight.is_floating_point():
        return f"its weights are {linear.weight.dtype}, quantised already"
    return None


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a module or one that it is in, by whole parts of the name."""
    parts = name.split(".")
    ends = range(1, len(parts) + 1)
    outer = (".".join(parts[start:end]) for end in ends for start in range(end))
    return any(fnmatch.fnmatchcase(part, pattern) for part in outer)


def _check_names(model: nn.Module, skip: Sequence[str]) -> None:
    if isinstance(skip, str):
        raise ConfigError(f"skip must be a list of names, got the text {skip!r:.100}")
    names = [name for name, _ in model.named_modules()]
    for pattern in skip:
        if pattern != _HEAD and not any(_matches(name, pattern) for name in names):
            raise ConfigError(
                f"skip names {pattern!r}, but {type(model).__name__} has no such module",
                hint="print(model) shows the names",
            )
