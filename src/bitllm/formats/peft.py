"""Low-rank adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors.

What PEFT can do beyond plain LoRA on the projections of attention and feed-forward network is
refused by name: it would be left out otherwise, and the text be another one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np

from bitllm.adapter import Adapter, LowRankUpdate
from bitllm.checkpoint import DenseTensor
from bitllm.errors import (
    CheckpointError,
    FormatError,
    MissingTensorError,
    ModelNotFoundError,
    TensorShapeError,
    UnsupportedModelError,
)
from bitllm.formats.config_fields import ConfigFields
from bitllm.formats.json_file import read_json_object
from bitllm.formats.safetensors import SafetensorsFile
from bitllm.formats.tensor_names import LINEAR_MODULES

__all__ = ["open_adapter"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?((?:model\.)?layers\.([0-9]{1,6})\.([a-z_]+\.[a-z_]+))"
    r"\.lora_([AB])\.weight"
)
_LINEARS = {module: name for name, module in LINEAR_MODULES.items()}

# Switches that change what is computed; each is off where it is missing, false or empty.
_REFUSED = {
    "use_dora": "DoRA, which also scales the weights",
    "modules_to_save": "modules that are trained as a whole",
    "lora_bias": "biases in its matrices",
    "fan_in_fan_out": "transposed weights",
    "layer_replication": "layers that are used twice",
    "trainable_token_indices": "trained rows of the embedding",
    "target_parameters": "parameters that are no linear layers",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activation by invocation tokens (aLoRA)",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "routing among adapters (Arrow)",
    "kasa_config": "changed base weights (KaSA)",
    "monteclora_config": "sampled matrices (MonteCLoRA)",
}
_SMALLEST_SCALE, _LARGEST_SCALE = 1e-30, 1e30  # float32 holds them, and some room
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")

# Patterns are regular expressions in PEFT. Those of a hostile file could take for ever, so only
# the ones without repetition and alternatives are read: names, in practice.
_PLAIN_PATTERN = re.compile(r"(?:[\w.^$-]|\\[.d])*", re.ASCII)


def open_adapter(path: str | PathLike[str]) -> Adapter:
    """Open an adapter; its matrices are views of the mapped file.

    Args:
        path: the directory that PEFT's `save_pretrained` wrote, or one of its two files.

    Raises:
        ModelNotFoundError: there is no such directory, or no adapter in it.
        UnsupportedModelError: it does what bitllm does not run: DoRA, trained biases or embeddings,
            modules that are no projections.
        CheckpointError: one of its kinds, for whatever is wrong with the files.
    """
    directory = _directory(path)
    config = ConfigFields(directory / _CONFIG, read_json_object(directory / _CONFIG))
    _refuse_unsupported(config)
    weights = directory / _WEIGHTS
    if not weights.is_file():
        raise CheckpointError(
            f"{directory}: {_WEIGHTS} is missing",
            hint="save the adapter with safe_serialization=True; adapter_model.bin is not read",
        )
    file = SafetensorsFile(weights)
    pairs = _pairs(file)
    _check_targets(config, file, pairs)
    updates = {name: _update(config, file, module, pair) for name, (module, pair) in pairs.items()}
    file.release()
    return Adapter(str(directory), updates)


def _directory(path: str | PathLike[str]) -> Path:
    text = os.fspath(path)
    try:
        given = Path(text).expanduser()
        directory = given.parent if given.name in (_CONFIG, _WEIGHTS) else given
        if (directory / _CONFIG).is_file():
            return directory.resolve()
        there = directory.is_dir()
    except (OSError, RuntimeError, ValueError):
        there = False
    raise ModelNotFoundError(
        f"{text!r:.200}: no {_CONFIG} there" if there else f"there is no adapter {text!r:.200}",
        hint="name the directory that PEFT's save_pretrained wrote",
    )


def _refuse_unsupported(config: ConfigFields) -> None:
    kind = config.text("peft_type", "")
    if kind.upper() != "LORA":
        raise UnsupportedModelError(
            f"{config.path}: the adapter is of the type {kind!r:.40}", hint="bitllm runs LORA"
        )
    for key, what in _REFUSED.items():
        if config.get(key):
            raise UnsupportedModelError(
                f"{config.path}: {key} is set: the adapter has {what}", hint=_MERGE
            )
    if config.text("bias", "none") != "none":
        raise UnsupportedModelError(
            f"{config.path}: bias is {config.get('bias')!r:.40}: the adapter has trained biases",
            hint='train it with bias="none"',
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UnsupportedModelError(
            f"{config.path}: init_lora_weights is {start!r:.40}: the base weights were changed "
            "with the adapter",
            hint="convert it with save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


_MERGE = "bitllm adds plain LoRA of q, k, v, o, gate, up and down; train the adapter without it"


def _pairs(file: SafetensorsFile) -> dict[str, tuple[str, dict[str, str]]]:
    """Return, by canonical name, a linear's module and the names of its A and B.

    Raises:
        UnsupportedModelError: a tensor that is neither.
        FormatError: there is nothing, or a matrix twice.
    """
    pairs: dict[str, tuple[str, dict[str, str]]] = {}
    for name in file.entries:
        match = _TENSOR.fullmatch(name)
        if match is None or match[3] not in _LINEARS:
            raise UnsupportedModelError(
                f"{file.path}: {name!r:.200} is no matrix of a projection", hint=_MERGE
            )
        linear = f"layers.{int(match[2])}.{_LINEARS[match[3]]}"
        _, pair = pairs.setdefault(linear, (match[1], {}))
        if match[4] in pair:
            raise FormatError(f"{file.path}: {linear} has two matrices {match[4]}")
        pair[match[4]] = name
    if not pairs:
        raise FormatError(f"{file.path}: the adapter has no matrices")
    return pairs


def _check_targets(
    config: ConfigFields, file: SafetensorsFile, pairs: Mapping[str, object]
) -> None:
    """Refuse a file without a matrix for a projection that the configuration names."""
    targets = config.get("target_modules")
    if targets is None or isinstance(targets, str):  # a pattern, or "all-linear"
        return
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        raise config.fail("target_modules", "a list of names")
    present = {LINEAR_MODULES[name.split(".")[2]].split(".")[1] for name in pairs}
    known = {module.split(".")[1] for module in _LINEARS}
    for target in targets:
        if target in known - present:
            raise MissingTensorError(
                f"{file.path}: target_modules names {target}, but there is no matrix for it",
                hint="the two files do not belong together; save the adapter again",
            )


def _update(
    config: ConfigFields, file: SafetensorsFile, module: str, pair: Mapping[str, str]
) -> LowRankUpdate:
    for part, other in ("AB", "BA"):
        if part not in pair:
            raise MissingTensorError(
                f"{file.path}: {pair[other]!r} has no lora_{part} beside it",
                hint="the file is not complete; save the adapter again",
            )
    a, b = (_matrix(file, pair[part]) for part in "AB")
    rank = _of_module(config, "rank_pattern", module)
    rank = config.size("r", default=8) if rank is None else rank
    if a.shape[0] != rank or b.shape[1] != rank:
        raise TensorShapeError(
            f"{file.path}: A and B of {module} are {list(a.shape)} and {list(b.shape)}, but "
            f"{config.path.name} says that their rank is {rank:g}",
            hint="the two files do not belong together; save the adapter again",
        )
    alpha = _of_module(config, "alpha_pattern", module)
    alpha = config.positive("lora_alpha", default=8.0) if alpha is None else alpha
    scale = alpha / (math.sqrt(rank) if config.switch("use_rslora") else rank)
    if not _SMALLEST_SCALE < scale < _LARGEST_SCALE:
        raise config.fail("lora_alpha", "a number that gives a scale within float32")
    return LowRankUpdate(a, b, scale)


def _matrix(file: SafetensorsFile, name: str) -> DenseTensor:
    tensor = file.dense(name)
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise TensorShapeError(f"{file.path}: {name!r} is {list(tensor.shape)}, which is no matrix")
    if not np.isfinite(tensor.to_float32()).all():
        raise FormatError(f"{file.path}: {name!r} holds NaN or infinity")
    return tensor


def _of_module(config: ConfigFields, key: str, module: str) -> float | None:
    """Return what the first pattern that ends like `module` says, None if there is none."""
    patterns = config.section(key)
    for pattern in {} if patterns is None else patterns.fields:
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise UnsupportedModelError(
                f"{config.path}: {key} has the pattern {pattern!r:.100}",
                hint="bitllm reads names of modules there, not general regular expressions",
            )
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise FormatError(f"{config.path}: {key}: {pattern!r:.100}: {error}") from error
        if found and patterns is not None:
            return patterns.positive(pattern, 1.0)
    return None
