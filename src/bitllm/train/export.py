"""Writes a trained model as a Hugging Face folder in the packed `bitnet` format.

The seven projections of a layer become 2-bit codes in uint8 with a bfloat16 `weight_scale` that
multiplies (`linear_class` "autobitlinear", mode "offline"); everything else is bfloat16. bitllm
loads the folder, and so does `BitNetForCausalLM` of transformers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from bitllm.checkpoint import Checkpoint, DenseTensor, TernaryMatrix
from bitllm.formats.writers import write_directory
from bitllm.formats.writers.config import huggingface_config
from bitllm.formats.writers.dense import dense_chunks
from bitllm.formats.writers.huggingface import (
    SHARD_BYTES,
    STORED_DTYPES,
    plan_huggingface,
    stored_names,
)
from bitllm.formats.writers.planned import PlannedFile, PlannedTensor
from bitllm.formats.writers.safetensors import plan_safetensors
from bitllm.formats.writers.texts import CONFIG_FILE, ModelTexts
from bitllm.train.model import TernaryDecoder
from bitllm.train.quantizers import quantize_weights
from bitllm.train.recipe import ExportSettings
from bitllm.train.tokenizer_training import BEGIN, END, END_OF_TURN, tokenizer_config

__all__ = ["export_masters", "export_model", "trained_texts"]


def export_model(model: TernaryDecoder, texts: ModelTexts, folder: Path) -> Path:
    """Write a model folder of packed weights; an older one of that name is replaced.

    Args:
        model: what to write.
        texts: tokenizer and defaults of generation.
        folder: the folder to write.

    Returns:
        `folder`.

    Raises:
        UnsupportedModelError: the format cannot say this architecture.
        CheckpointError: the folder cannot be written.
    """
    checkpoint = Checkpoint(model.spec, _TrainedSource(model), "the trained model")
    plan = plan_huggingface(checkpoint, texts, convention="multiply")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_directory(folder, plan.files, replace=True)
    return folder


def export_masters(model: TernaryDecoder, texts: ModelTexts, folder: Path) -> Path:
    """Write a model folder of master weights in float32, to train on from.

    bitllm and transformers read it too, and round the masters then (mode "online"). Arguments,
    result and errors are those of `export_model`.
    """
    names = stored_names(model.spec)
    stored = {*(names[name] for name in model.spec.dense_shapes())}
    stored |= {f"{names[name]}.weight" for name, _ in model.spec.linear_names()}
    tensors = [
        _plan_master(name, value.detach())
        for name, value in model.named_parameters()
        if name in stored
    ]
    config = {**huggingface_config(model.spec, "multiply", "f32"), **texts.token_ids}
    config["quantization_config"] = {**config["quantization_config"], "quantization_mode": "online"}
    files = [
        *plan_safetensors(tensors, {"format": "pt"}, SHARD_BYTES),
        PlannedFile.of(CONFIG_FILE, _json(config)),
        *texts.planned(),
    ]
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_directory(folder, files, replace=True)
    return folder


def _plan_master(name: str, value: torch.Tensor) -> PlannedTensor:
    values = value.float().cpu().numpy()
    dense = DenseTensor(values, "f32")
    chunks = functools.partial(dense_chunks, dense)
    return PlannedTensor(name, STORED_DTYPES["f32"], values.shape, values.nbytes, name, chunks)


def trained_texts(tokenizer: Path, context: int, settings: ExportSettings) -> ModelTexts:
    """Return the text files of a model whose tokenizer was trained here.

    Args:
        tokenizer: its tokenizer.json, trained by `train_tokenizer`.
        context: longest text of the model.
        settings: defaults of generation.
    """
    text = tokenizer.read_bytes()
    special = {entry["content"]: entry["id"] for entry in json.loads(text)["added_tokens"]}
    return ModelTexts(
        files={
            "tokenizer.json": text,
            "tokenizer_config.json": _json(tokenizer_config(context)),
            "generation_config.json": _json(_generation_config(special, settings)),
        },
        token_ids={"bos_token_id": special[BEGIN], "eos_token_id": special[END]},
    )


class _TrainedSource:
    """The tensors of a model in training as its export holds them: codes, the rest bfloat16."""

    def __init__(self, model: TernaryDecoder) -> None:
        self._parameters = {name: value.detach() for name, value in model.named_parameters()}
        self._names = stored_names(model.spec)

    def dense(self, name: str) -> DenseTensor | None:
        """Return the tensor in bfloat16, or None if the model has none of that name."""
        if name not in self._names:
            return None
        bits = self._parameters[self._names[name]].bfloat16().contiguous().view(torch.uint16)
        return DenseTensor(bits.cpu().numpy(), "bf16")

    def ternary(self, name: str) -> TernaryMatrix | None:
        """Quantise the weights of a projection; the scale is the bfloat16 that was trained with."""
        if name not in self._names:
            return None
        codes, scale = quantize_weights(self._parameters[f"{self._names[name]}.weight"])
        stored = scale.bfloat16().view(torch.uint16).cpu().numpy()
        return TernaryMatrix.from_codes(
            codes.to(torch.int8).cpu().numpy(),
            scale.cpu().numpy(),
            source_scales=DenseTensor(stored, "bf16"),
        )


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


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
