"""Learning from a dense teacher: its next-token distributions and its attention relations.

The loss of BitDistill (Wu et al., BitNet Distillation, 2025):

    cross-entropy + logits_weight * KL(teacher || student) + relation_weight * relations

The divergence of the logits, both divided by the temperature, is averaged over the tokens that
are learned. Relations are those of MiniLM (Wang et al., MiniLMv2, 2021): queries, keys and values
of one layer, cut into heads, tell by softmax(A A^T / sqrt(d)) how alike positions are; the
divergence is averaged over rows and heads and added up over the three. As in attention, a row looks
at itself and what lies before it in its document: what comes after is not there when a decoder
runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitllm.errors import ConfigError
from bitllm.train.model import UNTRAINED, TernaryDecoder, token_loss
from bitllm.train.recipe import DistillationSettings

__all__ = ["Distillation", "logits_divergence", "relation_divergence"]


class Distillation:
    """A teacher and how much it counts.

    Args:
        teacher: a dense model; it is not changed.
        student: the model that learns.
        settings: weights and temperature.

    Raises:
        ConfigError: teacher and student do not fit each other, or have no such layer.
    """

    def __init__(
        self, teacher: TernaryDecoder, student: TernaryDecoder, settings: DistillationSettings
    ) -> None:
        self._teacher, self._settings = teacher.eval().requires_grad_(False), settings
        if teacher.spec.vocab_size != student.spec.vocab_size:
            raise ConfigError(
                f"the teacher has {teacher.spec.vocab_size} ids, "
                f"the student {student.spec.vocab_size}",
                hint="distillation needs models with one tokenizer",
            )
        for model in teacher, student:
            _check_relations(model, settings)

    def loss(
        self, student: TernaryDecoder, ids: Tensor, documents: Tensor | None, targets: Tensor
    ) -> Tensor:
        """Return the loss of a batch.

        Args:
            student: the model that learns.
            ids: int64 [batch, time].
            documents: as for `TernaryDecoder.forward`.
            targets: int64 [batch, time], as for `token_loss`.
        """
        settings = self._settings
        with _states(student, settings.relation_layer) as of_student:
            logits = student(ids, documents)
        with torch.no_grad(), _states(self._teacher, settings.relation_layer) as of_teacher:
            wanted = self._teacher(ids, documents)
        loss = token_loss(logits, targets)
        if settings.logits_weight:
            divergence = logits_divergence(wanted, logits, targets, settings.temperature)
            loss = loss + settings.logits_weight * divergence
        if settings.relation_weight:
            parts = [
                relation_divergence(t, s, documents, settings.relation_heads)
                for t, s in zip(of_teacher, of_student, strict=True)
            ]
            loss = loss + settings.relation_weight * torch.stack(parts).sum()
        return loss


def _check_relations(model: TernaryDecoder, settings: DistillationSettings) -> None:
    layers = model.spec.layers
    if not -len(layers) <= settings.relation_layer < len(layers):
        raise ConfigError(
            f"distillation.relation_layer {settings.relation_layer} is not there: "
            f"a model has {len(layers)} layers"
        )
    layer = layers[settings.relation_layer]
    for linear in layer.q, layer.k, layer.v:
        if linear.out_features % settings.relation_heads:
            raise ConfigError(
                f"distillation.relation_heads {settings.relation_heads} does not divide "
                f"{linear.out_features}, the size of the queries, keys or values"
            )


@contextmanager
def _states(model: TernaryDecoder, layer: int) -> Iterator[list[Tensor]]:
    """Collect queries, keys and values of a layer, before positions turn them."""
    attention: Any = model.model.layers[layer].self_attn
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output)

    modules = attention.q_proj, attention.k_proj, attention.v_proj
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def logits_divergence(
    teacher: Tensor, student: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    """Return KL(teacher || student) in nats, averaged over the tokens that are learned.

    Args:
        teacher: logits [batch, time, vocab].
        student: likewise.
        targets: int64 [batch, time]; `UNTRAINED` where nothing is learned.
        temperature: both logits are divided by it.
    """
    learned = targets != UNTRAINED
    wanted = functional.log_softmax(teacher[learned].float() / temperature, dim=-1)
    found = functional.log_softmax(student[learned].float() / temperature, dim=-1)
    return functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def relation_divergence(
    teacher: Tensor, student: Tensor, documents: Tensor | None, heads: int
) -> Tensor:
    """Return KL(relations of the teacher || those of the student), averaged over rows and heads.

    Args:
        teacher: queries, keys or values [batch, time, size].
        student: likewise; the size may be another.
        documents: as for `TernaryDecoder.forward`.
        heads: into how many parts the sizes are cut.
    """
    time = teacher.shape[1]
    seen = torch.ones(time, time, dtype=torch.bool, device=teacher.device).tril()
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    wanted, found = (_relations(states, seen, heads) for states in (teacher, student))
    rows = wanted.exp() * (wanted - found)
    return rows.masked_fill(~seen, 0.0).sum(dim=-1).mean()


def _relations(states: Tensor, seen: Tensor, heads: int) -> Tensor:
    """Log-probabilities [batch, heads, time, time]; finite where nothing is seen."""
    cut = states.float().reshape(*states.shape[:-1], heads, -1).transpose(1, 2)
    scores = cut @ cut.transpose(-1, -2) / math.sqrt(cut.shape[-1])
    lowest = torch.finfo(scores.dtype).min
    return functional.log_softmax(scores.masked_fill(~seen, lowest), dim=-1)
