"""Low-rank adapters over frozen ternary weights, saved as PEFT saves them.

y = ternary(x) + alpha / rank * B (A x)    (LoRA; Hu et al., 2021)

The ternary product is the deployed one, with the codes and scales of the checkpoint; only A and B
are trained. A starts at random, B at zero, so that an adapter begins by changing nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from bitllm.checkpoint import LINEAR_NAMES, Checkpoint, LinearSpec, TernaryMatrix
from bitllm.errors import UnsupportedModelError
from bitllm.formats.writers import write_directory
from bitllm.formats.writers.huggingface import stored_names
from bitllm.formats.writers.planned import PlannedFile
from bitllm.train.model import TernaryDecoder
from bitllm.train.quantizers import quantize_activations
from bitllm.train.recipe import AdapterSettings

__all__ = ["AdaptedLinear", "adapted_model", "adapter_state", "save_adapter"]


class _FrozenProduct(torch.autograd.Function):
    """y = (q @ codes.T) / a * scale; the gradient reaches the inputs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, rounds: bool) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.dtype = x.dtype
        if not rounds:
            return ((x.float() @ codes.t().float()) * scale).to(x.dtype)
        q, a = quantize_activations(x)
        return (q @ codes.t().float()).div_(a).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scale = ctx.saved_tensors
        return ((grad.float() * scale) @ codes.float()).to(ctx.dtype), None, None, None


class AdaptedLinear(nn.Module):
    """A ternary projection that stays as it is, with a low-rank update beside it.

    Args:
        matrix: codes and scales; one scale for the matrix or one a row.
        spec: of the projection.
        rank: of the update; 0 for none.
        alpha: strength of the update.

    Raises:
        UnsupportedModelError: the matrix has scales for groups.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, matrix: TernaryMatrix, spec: LinearSpec, rank: int, alpha: float) -> None:
        super().__init__()
        if matrix.group_size is not None:
            raise UnsupportedModelError("adapters are not trained over weights with group scales")
        self.register_buffer("codes", torch.from_numpy(matrix.codes()), persistent=False)
        scales = torch.from_numpy(np.array(matrix.scales))
        self.register_buffer("scale", scales, persistent=False)
        self.rounds = spec.activation_bits is not None
        self.rms_norm = None
        if spec.norm_eps is not None:
            self.rms_norm = nn.RMSNorm(spec.in_features, spec.norm_eps)
        self.bias = nn.Parameter(torch.zeros(spec.out_features)) if spec.bias else None
        self.scaling = alpha / max(rank, 1)
        self.lora_A = self.lora_B = None
        if rank:
            self.lora_A = nn.Linear(spec.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, spec.out_features, bias=False)
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]; the update sees the input before the projection's norm."""
        inner = x if self.rms_norm is None else self.rms_norm(x)
        y: Tensor = _FrozenProduct.apply(inner, self.codes, self.scale, self.rounds)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y = y + self.bias
        if self.lora_A is None or self.lora_B is None:
            return y
        update: Tensor = self.lora_B(self.lora_A(x))
        return y + self.scaling * update


def adapted_model(checkpoint: Checkpoint, settings: AdapterSettings) -> TernaryDecoder:
    """Make a model of a ternary checkpoint in which only adapters are trained.

    Args:
        checkpoint: the model, in any format that is read.
        settings: rank, strength and targets of the adapters.

    Raises:
        UnsupportedModelError: an architecture that is not trained here, or group scales.
    """
    spec = checkpoint.spec
    if spec.layers and spec.layers[0].post_norms:
        raise UnsupportedModelError(f"{checkpoint.origin}: {spec.architecture} is not trained here")
    with torch.device("meta"):  # no memory for masters, which there are none of
        model = TernaryDecoder(spec)
    for index, layer in enumerate(spec.layers):
        for name in LINEAR_NAMES:
            rank = settings.rank if name in settings.targets else 0
            matrix = checkpoint.ternary(f"layers.{index}.{name}")
            adapted = AdaptedLinear(matrix, layer.linear(name), rank, settings.alpha)
            block = model.model.layers[index]
            setattr(block.self_attn if name in "qkvo" else block.mlp, f"{name}_proj", adapted)
    names = stored_names(spec)
    dense = {
        names[name]: torch.from_numpy(checkpoint.dense(name).to_float32().copy())
        for name in spec.dense_shapes()
    }
    model.load_state_dict(dense, strict=False, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrices of all adapters, by the names of their parameters."""
    return {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}


def save_adapter(model: nn.Module, settings: AdapterSettings, folder: Path, base: str) -> Path:
    """Write adapter_config.json and adapter_model.safetensors, as PEFT does.

    Args:
        model: with adapters.
        settings: theirs.
        folder: where to; one of that name is replaced.
        base: name of the model that the adapters belong to.

    Returns:
        `folder`.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = {
        f"base_model.model.{name}": value.float().cpu().numpy()
        for name, value in adapter_state(model).items()
    }
    config = json.dumps(_peft_config(settings, base), indent=2) + "\n"
    files = [
        PlannedFile.of("adapter_config.json", config.encode()),
        PlannedFile.of("adapter_model.safetensors", save(tensors, {"format": "pt"})),
    ]
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_directory(folder, files, replace=True)
    return folder


def _peft_config(settings: AdapterSettings, base: str) -> dict[str, Any]:
    targets: Sequence[str] = [f"{name}_proj" for name in settings.targets]
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
    }
