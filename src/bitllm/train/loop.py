"""The training loop: AdamW in two stages, a log, and checkpoints to go on from.

A run is a function of its recipe: the batch of a step depends on the seed and the step alone, and
there is no dropout. So a run that was interrupted and resumed ends in the same weights as one
that was not.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitllm.errors import ConfigError, FormatError, TrainingError
from bitllm.train.bits import held_out_pieces, torch_bits
from bitllm.train.data import ShuffledWindows, TokenShards
from bitllm.train.model import TernaryDecoder
from bitllm.train.recipe import Recipe, TrainingSettings

__all__ = ["CHECKPOINT_NAME", "LOG_NAME", "TrainingResult", "train"]

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "log.csv"
_LOG_COLUMNS = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "held_out_bpb")

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        model: the trained model.
        losses: mean training loss of each line of the log, in nats per token.
        held_out_bpb: bits per byte of the held-out text, NaN if there is none.
    """

    model: TernaryDecoder
    losses: tuple[float, ...]
    held_out_bpb: float


def report_to_stderr(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def train(
    recipe: Recipe,
    shards: Path,
    out: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    report: Report = report_to_stderr,
) -> TrainingResult:
    """Train a model by its recipe.

    Args:
        recipe: the run.
        shards: folder of token shards.
        out: folder for the log and the checkpoint.
        resume: go on from the checkpoint in `out`.
        stop_after: stop behind this step, as an interruption would, with a checkpoint written.
        report: gets lines of progress.

    Raises:
        ConfigError: recipe, shards and checkpoint do not belong together, or there is none to
            resume from.
        FormatError: the checkpoint is damaged.
        TrainingError: the loss is no number any more.
    """
    settings = recipe.training
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(recipe, shards, out, report)
    if resume:
        run.restore()
    run.advance(min(settings.steps, stop_after or settings.steps))
    finished = run.step == settings.steps
    held_out_bpb = run.rows[-1]["held_out_bpb"] if finished else run.held_out_bpb()
    return TrainingResult(run.model, tuple(run.losses()), held_out_bpb)


class _Run:
    """The state of a run: model, optimizer, position and log."""

    def __init__(self, recipe: Recipe, shards: Path, out: Path, report: Report) -> None:
        self.recipe, self.settings, self.out, self.report = recipe, recipe.training, out, report
        torch.manual_seed(self.settings.seed)
        self.model = TernaryDecoder(recipe.spec())
        self.optimizer = _optimizer(self.model, self.settings)
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.recent: list[float] = []
        text = TokenShards.open(shards, "train")
        if text.vocab_size != recipe.tokenizer.vocab_size:
            raise ConfigError(
                f"{shards}: the shards have {text.vocab_size} ids, "
                f"the recipe says tokenizer.vocab_size = {recipe.tokenizer.vocab_size}"
            )
        window = self.settings.sequence_length + 1
        self.windows = ShuffledWindows(text, window, self.settings.batch_size, self.settings.seed)
        held_out = TokenShards.open(shards, "held_out")
        self.pieces = held_out_pieces(held_out, self.settings.sequence_length)
        self.held_out_bytes = held_out.text_bytes

    def losses(self) -> list[float]:
        return [float(row["loss"]) for row in self.rows]

    def held_out_bpb(self) -> float:
        if not self.pieces:
            return math.nan
        return torch_bits(self.model, self.pieces) / self.held_out_bytes

    def advance(self, last: int) -> None:
        """Run the steps up to `last`, with log and checkpoints."""
        settings = self.settings
        started, first = time.monotonic(), self.step
        while self.step < last:
            loss, norm = self._train_step()
            self.recent.append(loss)
            self.step += 1
            done = self.step == settings.steps
            if self.step % settings.log_every == 0 or done:
                self._log(norm, (time.monotonic() - started) / (self.step - first))
            if self.step % settings.checkpoint_every == 0 or self.step == last:
                self._save()

    def _train_step(self) -> tuple[float, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step)
            if group["decays"]:
                group["weight_decay"] = self.settings.weight_decay_at(self.step)
        loss = self.model.loss(torch.from_numpy(self.windows.batch(self.step)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise TrainingError(
                f"step {self.step}: the loss is {loss.item()} and the gradient norm {norm.item()}",
                hint="lower training.learning_rate or raise training.warmup_steps",
            )
        self.optimizer.step()
        return loss.item(), norm.item()

    def _log(self, norm: float, seconds_per_step: float) -> None:
        settings = self.settings
        tokens = settings.batch_size * settings.sequence_length
        evaluates = self.step % settings.evaluate_every == 0 or self.step == settings.steps
        row = {
            "step": self.step,
            "loss": sum(self.recent) / len(self.recent),
            "learning_rate": settings.learning_rate_at(self.step - 1),
            "gradient_norm": norm,
            "tokens": self.step * tokens,
            "held_out_bpb": self.held_out_bpb() if evaluates else "",
        }
        self.recent = []
        self.rows.append(row)
        _write_csv(self.out / LOG_NAME, self.rows)
        left = (settings.steps - self.step) * seconds_per_step / 60
        held_out = f"  held out {row['held_out_bpb']:.4f} bits/byte" if evaluates else ""
        self.report(
            f"step {self.step}/{settings.steps}  loss {row['loss']:.4f}{held_out}  "
            f"{tokens / seconds_per_step:.0f} tok/s  {left:.1f} min left"
        )

    def _save(self) -> None:
        """Write the checkpoint beside the old one, then put it in its place in one move."""
        state = {
            "recipe": _fingerprint(self.recipe),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows,
            "recent": self.recent,
        }
        temporary = self.out / f"{CHECKPOINT_NAME}.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / CHECKPOINT_NAME)

    def restore(self) -> None:
        """Continue from the checkpoint in the output folder."""
        path = self.out / CHECKPOINT_NAME
        if not path.exists():
            raise ConfigError(f"{path}: no checkpoint to resume from", hint="run without --resume")
        try:
            state = torch.load(path, weights_only=True)
            wanted = state["recipe"]
            if wanted == _fingerprint(self.recipe):
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.step, self.rows, self.recent = state["step"], state["rows"], state["recent"]
        except Exception as error:  # torch.load raises whatever the bytes provoke
            raise FormatError(
                f"{path}: this checkpoint is damaged: {type(error).__name__}",
                hint="delete it and start again",
            ) from error
        if wanted != _fingerprint(self.recipe):
            raise ConfigError(
                f"{path}: this checkpoint belongs to another recipe",
                hint="resume with the recipe it was started with, or start again in another folder",
            )
        self.report(f"resumed at step {self.step} from {path}")


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW with decay on matrices and none on norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay, "decays": True},
        {"params": vectors, "weight_decay": 0.0, "decays": False},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)


def _fingerprint(recipe: Recipe) -> str:
    """What a checkpoint depends on: architecture and optimisation, not how often it is logged."""
    training = dataclasses.replace(
        recipe.training, threads=None, log_every=1, evaluate_every=1, checkpoint_every=1
    )
    return repr((recipe.tokenizer, recipe.model, training))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _LOG_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
