"""The model a run starts from: random weights, a dense or master checkpoint, or a ternary one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from bitllm.checkpoint import ModelSpec
from bitllm.errors import TensorShapeError, UnsupportedModelError
from bitllm.formats import resolve_model
from bitllm.formats.architecture import ARCHITECTURES, read_model_spec
from bitllm.formats.json_file import read_json_object
from bitllm.formats.quantization import read_quantization
from bitllm.formats.tensor_names import TensorNames
from bitllm.formats.weight_files import FLOATS, WeightFile, entry_of, open_weight_files
from bitllm.formats.writers.huggingface import stored_names
from bitllm.train.in_place import dequantize_model, quantize_model
from bitllm.train.model import TernaryDecoder
from bitllm.train.recipe import QuantizationSettings, Recipe

__all__ = [
    "DenseModel",
    "find_model",
    "initial_model",
    "open_dense",
    "read_dense",
    "recipe_spec",
    "set_variant",
    "teacher_model",
]


@dataclass(frozen=True, slots=True)
class DenseModel:
    """A checkpoint of floating-point weights: dense ones, or masters of a ternary model.

    Attributes:
        directory: where it is.
        spec: its architecture, with int8 activations.
        files: the file of each tensor, by the tensor's name.
    """

    directory: Path
    spec: ModelSpec
    files: dict[str, WeightFile]


def find_model(model: str, folder: Path) -> Path:
    """Return the directory of a model that a recipe names, relative to the recipe's folder.

    Raises:
        ModelNotFoundError: nothing is there under this name.
        CheckpointError: it cannot be downloaded.
    """
    local = folder / model
    return resolve_model(local if local.exists() else model).path


def open_dense(directory: Path) -> DenseModel:
    """Open a checkpoint of floating-point weights.

    Args:
        directory: config.json and safetensors files, as transformers writes them.

    Raises:
        UnsupportedModelError: the weights are rounded already, or the architecture is not trained.
        CheckpointError: one of its kinds, for whatever is wrong with the files.
    """
    config = directory / "config.json"
    fields = read_json_object(config)
    files = open_weight_files(directory)
    quantization = read_quantization(config, fields, files)
    if quantization.affine is not None or (
        quantization.declared and quantization.weights != "masters"
    ):
        raise UnsupportedModelError(
            f"{directory}: the weights of this model are rounded, and its masters are not there",
            hint="start from the masters (their name often ends in -bf16 or prequantized), or "
            "train an [adapter]",
        )
    spec = read_model_spec(config, fields, replace(quantization, activation_bits=8), files)
    if ARCHITECTURES[spec.architecture].gain_offset or spec.layers[0].post_norms:
        raise UnsupportedModelError(f"{directory}: {spec.architecture} is not trained here")
    return DenseModel(directory, spec, files)


def read_dense(model: nn.Module, dense: DenseModel) -> None:
    """Read the weights of a checkpoint into a model, as float32.

    Args:
        model: a decoder of the same architecture; sub-norms that the checkpoint lacks keep their
            values.
        dense: the checkpoint.

    Raises:
        MissingTensorError: a tensor is not there.
        TensorShapeError: it has another shape, or no floating-point values.
    """
    parameters = dict(model.named_parameters())
    there = TensorNames(dense.spec, dense.files)
    here = stored_names(dense.spec)
    for name in dense.spec.dense_shapes():
        _read(parameters[here[name]], dense, there.dense(name))
    for name, _ in dense.spec.linear_names():
        _read(parameters[f"{here[name]}.weight"], dense, f"{there.module(name)}.weight")


def _read(parameter: nn.Parameter, dense: DenseModel, stored: str) -> None:
    entry = entry_of(dense.files, stored)
    if entry.shape != tuple(parameter.shape) or entry.dtype not in FLOATS:
        raise TensorShapeError(
            f"{dense.directory}: {stored!r} should be floating point {[*parameter.shape]}, "
            f"but is {entry.dtype} {[*entry.shape]}",
            hint="config.json does not belong to these weights, or they are quantised already",
        )
    file = dense.files[stored]
    values = torch.from_numpy(file.dense(stored).to_float32().copy())
    if not values.isfinite().all():
        raise TensorShapeError(f"{dense.directory}: {stored!r} holds NaN or infinity")
    with torch.no_grad():
        parameter.copy_(values)
    file.release(stored)


def recipe_spec(recipe: Recipe) -> ModelSpec:
    """Return the architecture that a recipe trains.

    Raises:
        CheckpointError: one of its kinds, for the model in [start].
    """
    if recipe.start is None:
        return recipe.spec()
    dense = open_dense(find_model(recipe.start.model, recipe.folder))
    return _with_sub_norms(dense.spec) if recipe.start.sub_norms else dense.spec


def initial_model(recipe: Recipe) -> TernaryDecoder:
    """Make the model of a recipe as it is before the first step.

    Raises:
        CheckpointError: one of its kinds, for the model in [start].

    """
    model = TernaryDecoder(recipe_spec(recipe))
    if recipe.start is not None:
        read_dense(model, open_dense(find_model(recipe.start.model, recipe.folder)))
    set_variant(model, recipe.quantization)
    return model


def teacher_model(name: str, folder: Path) -> TernaryDecoder:
    """Read a dense model to learn from; arguments as for `find_model`.

    Raises:
        CheckpointError: one of its kinds, for whatever is wrong with the model.
    """
    dense = open_dense(find_model(name, folder))
    model = TernaryDecoder(dense.spec)
    read_dense(model, dense)
    set_variant(model, QuantizationSettings(weight_bits="dense"))
    return model


def set_variant(model: TernaryDecoder, settings: QuantizationSettings) -> None:
    """Make the projections of a model those that a recipe asks for."""
    if settings.weight_bits == "dense":
        dequantize_model(model, keep_masters=True)
        return
    quantize_model(
        model,
        weight_bits=settings.weight_bits,
        activation_bits=settings.activation_bits or None,
        strength=0.0 if settings.warmup_steps else None,
    )


def _with_sub_norms(spec: ModelSpec) -> ModelSpec:
    layers = tuple(replace(layer, attn_sub_norm=True, ffn_sub_norm=True) for layer in spec.layers)
    return replace(spec, layers=layers, architecture="BitNetForCausalLM")
