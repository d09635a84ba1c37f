"""Adapter directories as PEFT writes them, with everything open to change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bitllm.checkpoint import ModelSpec
from bitllm.formats.tensor_names import LINEAR_MODULES
from synthetic import random_adapter


@dataclass
class PeftAdapter:
    """The two files of an adapter."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, directory / "adapter_model.safetensors")
        return directory


def make_adapter(
    spec: ModelSpec, seed: int = 0, *, rank: int = 4, alpha: float = 6.0, **options: Any
) -> PeftAdapter:
    """A random adapter of all linears, or those of `linears`; see `random_adapter`."""
    adapter = random_adapter(spec, seed, rank=rank, **options)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/something",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.1,
        "target_modules": sorted({module_of(name).split(".")[-1] for name in adapter.updates}),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "a key nobody knows": {"x": [1]},
    }
    return PeftAdapter(config, _tensors(adapter.updates))


def module_of(name: str) -> str:
    """The module of a linear in the base model."""
    _, layer, linear = name.split(".")
    return f"model.layers.{layer}.{LINEAR_MODULES[linear]}"


def _tensors(updates: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        f"base_model.model.{module_of(name)}.lora_{part}.weight": tensor.data
        for name, update in updates.items()
        for part, tensor in (("A", update.a), ("B", update.b))
    }
