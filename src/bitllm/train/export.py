"""Writes a trained model as a Hugging Face folder in the packed `bitnet` format.

The seven projections of a layer become 2-bit codes in uint8 with a bfloat16 `weight_scale` that
multiplies (`linear_class` "autobitlinear", mode "offline"); everything else is bfloat16. bitllm
loads the folder, and so does `BitNetForCausalLM` of transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bitllm.checkpoint import Checkpoint, DenseTensor, TernaryMatrix
from bitllm.formats.writers import write_directory
from bitllm.formats.writers.huggingface import plan_huggingface, stored_names
from bitllm.formats.writers.texts import ModelTexts
from bitllm.train.model import TernaryDecoder
from bitllm.train.quantizers import quantize_weights
from bitllm.train.recipe import ExportSettings
from bitllm.train.tokenizer_training import BEGIN, END, END_OF_TURN, tokenizer_config

__all__ = ["export_model"]


def export_model(
    model: TernaryDecoder, tokenizer: Path, folder: Path, settings: ExportSettings
) -> Path:
    """Write a model folder; an older one of that name is replaced once the new one is whole.

    Args:
        model: what to write.
        tokenizer: its tokenizer.json, trained by `train_tokenizer`.
        folder: the folder to write.
        settings: defaults of generation.

    Returns:
        `folder`.

    Raises:
        UnsupportedModelError: the format cannot say this architecture.
        CheckpointError: the folder cannot be written.
    """
    text = tokenizer.read_bytes()
    special = {entry["content"]: entry["id"] for entry in json.loads(text)["added_tokens"]}
    texts = ModelTexts(
        files={
            "tokenizer.json": text,
            "tokenizer_config.json": _json(tokenizer_config(model.spec.max_context)),
            "generation_config.json": _json(_generation_config(special, settings)),
        },
        token_ids={"bos_token_id": special[BEGIN], "eos_token_id": special[END]},
    )
    checkpoint = Checkpoint(model.spec, _TrainedSource(model), "the trained model")
    plan = plan_huggingface(checkpoint, texts, convention="multiply")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_directory(folder, plan.files, replace=True)
    return folder


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
        return DenseTensor(bits.numpy(), "bf16")

    def ternary(self, name: str) -> TernaryMatrix | None:
        """Quantise the weights of a projection; the scale is the bfloat16 that was trained with."""
        if name not in self._names:
            return None
        codes, scale = quantize_weights(self._parameters[f"{self._names[name]}.weight"])
        stored = scale.bfloat16().view(torch.uint16).numpy()
        return TernaryMatrix.from_codes(
            codes.to(torch.int8).numpy(), scale.numpy(), source_scales=DenseTensor(stored, "bf16")
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
