"""Optimizers of a run: AdamW, or Muon for the matrices of the layers beside it."""

from __future__ import annotations

import torch
from torch import nn

from bitllm.errors import ConfigError
from bitllm.train.recipe import TrainingSettings

__all__ = ["make_optimizers", "set_rates"]


def make_optimizers(model: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Make the optimizers of a run, with decay on matrices and none on norms and biases.

    Raises:
        ConfigError: this PyTorch has no Muon.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = []
    if settings.optimizer == "muon":
        hidden = [p for name, p in trained if p.ndim == 2 and ".layers." in name]
    taken = {id(p) for p in hidden}
    matrices = [p for _, p in trained if p.ndim >= 2 and id(p) not in taken]
    vectors = [p for _, p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay, "decays": True},
        {"params": vectors, "weight_decay": 0.0, "decays": False},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
    ]
    if hidden:
        optimizers.append(_muon(hidden, settings))
    return optimizers


def _muon(matrices: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f'training.optimizer = "muon" needs PyTorch 2.9 or newer, this is {torch.__version__}',
            hint='pip install -U torch, or take "adamw"',
        )
    group = {"params": matrices, "decays": True, "muon": True}
    return torch.optim.Muon(
        [group], lr=settings.muon_learning_rate, weight_decay=settings.weight_decay
    )


def set_rates(
    optimizers: list[torch.optim.Optimizer], settings: TrainingSettings, step: int
) -> None:
    """Set learning rate and weight decay of a step."""
    rate = settings.learning_rate_at(step)
    of_muon = settings.muon_learning_rate * (rate / settings.learning_rate)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = of_muon if group.get("muon") else rate
            if group["decays"]:
                group["weight_decay"] = settings.weight_decay_at(step)
