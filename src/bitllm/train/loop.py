"""The training loop: steps, a log, evaluations, and checkpoints to go on from.

A run is a function of its recipe: the batch of a step depends on the seed and the step alone, and
there is no dropout. So a run that was interrupted, at whatever moment, and resumed ends in the same
bits as one that was not. Several ranks compute each batch together (`ranks`).
"""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitllm.errors import ConfigError, TrainingError
from bitllm.formats import open_checkpoint
from bitllm.train.adapters import adapted_model
from bitllm.train.anomalies import AnomalyDetector
from bitllm.train.averaging import WeightAverage
from bitllm.train.bits import torch_bits
from bitllm.train.corpus import HeldOut, open_corpus
from bitllm.train.data import TrainingBatch
from bitllm.train.distillation import Distillation
from bitllm.train.in_place import set_strength
from bitllm.train.interruption import Interruption
from bitllm.train.model import UNTRAINED, TernaryDecoder, token_loss
from bitllm.train.optimizers import make_optimizers, set_rates
from bitllm.train.ranks import Ranks, whole
from bitllm.train.recipe import Recipe
from bitllm.train.run_checkpoint import CHECKPOINT_NAME, damaged, read_state, write_state
from bitllm.train.run_log import LOG_NAME, Progress, TensorBoard, draw_curves, write_csv
from bitllm.train.sharded_checkpoint import has_shards, read_shards, write_shards_of_run
from bitllm.train.start import find_model, initial_model, teacher_model

__all__ = ["CHECKPOINT_NAME", "LOG_NAME", "TrainingResult", "train"]

_MOST_ROLL_BACKS = 3

Report = Callable[[str], None]
Watch = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        model: the trained model, on the CPU; of the averaged weights, where the recipe has an
            average. Of several ranks only the first has the weights.
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
    watch: Watch | None = None,
    ranks: Ranks | None = None,
) -> TrainingResult:
    """Train a model by its recipe.

    Args:
        recipe: the run.
        shards: folder of token shards; not read for dialogues.
        out: folder for the log and the checkpoint.
        resume: go on from the checkpoint in `out`.
        stop_after: stop behind this step, as an interruption would, with a checkpoint written.
        report: gets lines of progress.
        watch: gets the figures of each line of the log instead of `report`.
        ranks: the processes of the run; None = those that torchrun started, else this one alone.

    Raises:
        BackendUnavailableError: there is no such device.
        ConfigError: recipe, corpus and checkpoint do not belong together, or there is none to
            resume from.
        CheckpointError: one of its kinds, for a model that the recipe names, or a checkpoint that
            is damaged or cannot be written.
        TrainingError: the loss is no number any more, or jumped.
        SystemExit: SIGTERM or Ctrl-C came; a checkpoint is written.
    """
    settings = recipe.training
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    out.mkdir(parents=True, exist_ok=True)
    ranks = ranks or Ranks.join(settings.device)
    if not ranks.first:
        report, watch = _say_nothing, _say_nothing
    run = _Run(recipe, shards, out, report, watch, ranks)
    if resume:
        run.restore()
        report(f"resumed at step {run.step} from {out / CHECKPOINT_NAME}")
    with Interruption() as interruption:
        run.advance(min(settings.steps, stop_after or settings.steps), interruption)
    finished = run.step == settings.steps
    held_out_bpb = run.rows[-1]["held_out_bpb"] if finished else run.held_out_bpb()
    if run.average is not None:
        run.average.apply()
    return TrainingResult(run.gathered_model(), tuple(run.losses()), held_out_bpb)


def _say_nothing(line: object) -> None:
    """Stand in for a report: the first rank reports."""


class _Run:
    """The state of a run: model, optimizers, position and log."""

    def __init__(
        self,
        recipe: Recipe,
        shards: Path,
        out: Path,
        report: Report,
        watch: Watch | None,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.settings, self.out, self.report = recipe, recipe.training, out, report
        self.watch = watch or (lambda progress: report(str(progress)))
        self.ranks = ranks
        self.rows_here = ranks.rows(self.settings.batch_size)
        torch.manual_seed(self.settings.seed)
        self.model = _make_model(recipe)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if ranks.size > 1:
            _check_sharded(recipe)
        ranks.shard(self.model, list(self.model.model.layers))
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.distillation = None
        if recipe.distillation is not None:
            teacher = teacher_model(recipe.distillation.teacher, recipe.folder)
            teacher.to(ranks.device)
            self.distillation = Distillation(teacher, self.model, recipe.distillation)
        self.optimizers = make_optimizers(self.model, self.settings)
        decay = self.settings.ema
        self.average = WeightAverage(self.model, decay) if decay else None
        self.detector = AnomalyDetector(self.settings.spike_factor)
        self.corpus = open_corpus(recipe, shards, self.model.spec.vocab_size)
        writes = self.settings.tensorboard and ranks.first
        self.board = TensorBoard(out) if writes else None
        self.step = self.skipped = self.roll_backs = 0
        self.rows: list[dict[str, Any]] = []
        self.recent: list[float] = []

    def losses(self) -> list[float]:
        return [float(row["loss"]) for row in self.rows]

    def held_out_bpb(self) -> float:
        held_out = self.corpus.held_out
        if not held_out.pieces:
            return math.nan
        with nullcontext() if self.average is None else self.average.in_place():
            bits = self._bits(held_out)
        return bits / held_out.text_bytes

    def _bits(self, held_out: HeldOut) -> float:
        """Bits of all pieces; each rank takes every `size`-th, and all take equally many."""
        pieces, counted, size = held_out.pieces, held_out.counted, self.ranks.size
        if size == 1:
            return torch_bits(self.model, pieces, counted)
        bits = 0.0
        for first in range(0, len(pieces), size):
            place = first + self.ranks.rank
            index = min(place, len(pieces) - 1)
            marks = None if counted is None else counted[index : index + 1]
            found = torch_bits(self.model, pieces[index : index + 1], marks)
            bits += found if place < len(pieces) else 0.0
        self.ranks.let_go(self.model)
        return self.ranks.sums(bits)[0]

    def advance(self, last: int, interruption: Interruption) -> None:
        """Run the steps up to `last`, with log and checkpoints."""
        settings = self.settings
        if settings.on_anomaly == "roll_back" and self.step == 0:
            self._save()  # there has to be something to go back to
        started, tokens = time.monotonic(), 0
        while self.step < last:
            loss, norm, wrong = self._gradients()
            if wrong is not None:
                self._meet_anomaly(wrong)
                continue
            self._update(loss)
            tokens += self._tokens_in_a_step()
            done = self.step == settings.steps
            if self.step % settings.log_every == 0 or done:
                self._log(norm, tokens / max(time.monotonic() - started, 1e-9))
            # A signal may reach the ranks in different steps: they act on it in the same one.
            interrupted = self.ranks.sums(interruption.signal is not None)[0] > 0
            if self.step % settings.checkpoint_every == 0 or self.step == last or interrupted:
                self._save()
            if interrupted and self.step < last:
                self.report(f"interrupted behind step {self.step}; go on with --resume")
                raise SystemExit(128 + (interruption.signal or signal.SIGTERM))

    def _tokens_in_a_step(self) -> int:
        settings = self.settings
        return settings.batch_size * settings.accumulation * settings.sequence_length

    def _gradients(self) -> tuple[float, float, str | None]:
        """Compute the gradients of a step; return loss, norm, and what is wrong with them."""
        settings = self.settings
        set_rates(self.optimizers, settings, self.step)
        if self.recipe.quantization.warmup_steps:
            set_strength(self.model, self.recipe.quantization.strength_at(self.step))
        first = self.step * settings.accumulation + self.skipped
        batches = [self.corpus.batches.batch(first + i) for i in range(settings.accumulation)]
        learned = sum(batch.trained_tokens for batch in batches)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            if batch.trained_tokens:
                mine = batch.rows(self.rows_here)
                part = self._loss(mine) * (mine.trained_tokens / learned)
                # FSDP takes the mean over the ranks, where the parts of a batch are to be added.
                (part * self.ranks.size).backward()  # type: ignore[no-untyped-call]
                total += part.item()
        total = self.ranks.sums(total)[0]
        clipped = nn.utils.clip_grad_norm_(self.trained.values(), settings.gradient_clip)
        norm = whole(clipped).item()
        return total, norm, self.detector.check(total, norm)

    def _loss(self, batch: TrainingBatch) -> Tensor:
        device = self.ranks.device
        ids = torch.from_numpy(batch.ids).to(device)
        targets = ids[:, 1:]
        if batch.trained is not None:
            trained = torch.from_numpy(batch.trained[:, 1:]).to(device)
            targets = targets.masked_fill(~trained, UNTRAINED)
        documents = None
        if batch.documents is not None:
            documents = torch.from_numpy(batch.documents[:, :-1]).to(device)
        low = self.settings.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            if self.distillation is not None:
                return self.distillation.loss(self.model, ids[:, :-1], documents, targets)
            logits: Tensor = self.model(ids[:, :-1], documents)
            if not batch.trained_tokens:  # of a rank whose part has none; the others wait for it
                return logits.float().sum() * 0.0
            return token_loss(logits, targets)

    def _update(self, loss: float) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            self.average.update(self.step)
        self.recent.append(loss)
        self.step += 1

    def _meet_anomaly(self, wrong: str) -> None:
        """Stop, or go back to the last checkpoint and on with other text."""
        step, skipped, count = self.step, self.skipped, self.roll_backs + 1
        if self.settings.on_anomaly == "stop" or count > _MOST_ROLL_BACKS:
            often = f", after {count - 1} roll-backs" if count > 1 else ""
            raise TrainingError(
                f"step {step}: {wrong}{often}",
                hint="lower training.learning_rate or raise training.warmup_steps",
            )
        self.restore()
        self.roll_backs = count
        self.skipped = skipped + (step - self.step + 1) * self.settings.accumulation
        self.report(f"step {step}: {wrong}; back to step {self.step}, with other text")

    def _log(self, norm: float, tokens_per_second: float) -> None:
        settings = self.settings
        evaluates = self.step % settings.evaluate_every == 0 or self.step == settings.steps
        row: dict[str, Any] = {
            "step": self.step,
            "loss": sum(self.recent) / len(self.recent),
            "learning_rate": settings.learning_rate_at(self.step - 1),
            "gradient_norm": norm,
            "tokens": self.step * self._tokens_in_a_step(),
            "held_out_bpb": self.held_out_bpb() if evaluates else "",
        }
        self.recent = []
        self.rows.append(row)
        if not self.ranks.first:
            return
        write_csv(self.out, self.rows)
        left = (settings.steps - self.step) * self._tokens_in_a_step()
        progress = Progress(
            step=self.step,
            steps=settings.steps,
            loss=row["loss"],
            learning_rate=row["learning_rate"],
            gradient_norm=norm,
            strength=self.recipe.quantization.strength_at(self.step - 1),
            tokens_per_second=tokens_per_second,
            flops_per_second=6 * self.parameters * tokens_per_second,
            seconds_left=left / tokens_per_second,
            held_out_bpb=row["held_out_bpb"] if evaluates else None,
        )
        self.watch(progress)
        if self.board is not None:
            self.board.add(progress)
        if settings.picture and evaluates:
            draw_curves(self.out, self.rows)

    def _save(self) -> None:
        state = {
            "recipe": _fingerprint(self.recipe),
            "step": self.step,
            "skipped": self.skipped,
            "roll_backs": self.roll_backs,
            "random": torch.get_rng_state(),
            "usual": self.detector.state(),
            "rows": self.rows,
            "recent": self.recent,
        }
        if self.ranks.size > 1:
            tensors = self._sharded_tensors()
            write_shards_of_run(self.out, self.step, tensors, state, self.ranks)
            return
        state |= {
            "model": {name: p.detach() for name, p in self.trained.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": None if self.average is None else self.average.state(),
        }
        write_state(self.out, state)

    def restore(self) -> None:
        """Go on from the checkpoint in the output folder."""
        fingerprint = _fingerprint(self.recipe)
        if self.ranks.size > 1:
            tensors, state = read_shards(self.out, fingerprint, self._blank, self.ranks)
        elif has_shards(self.out) and not (self.out / CHECKPOINT_NAME).exists():
            raise ConfigError(
                f"{self.out}: the checkpoint here was written by several ranks",
                hint="resume under torchrun with two or more",
            )
        else:
            tensors, state = {}, read_state(self.out, fingerprint)
        try:
            if tensors:
                self._take_sharded(tensors)
            else:
                self._take(state)
            torch.set_rng_state(state["random"])
            self.detector.load(state["usual"])
            self.rows, self.recent = state["rows"], state["recent"]
            self.step, self.skipped = state["step"], state["skipped"]
            self.roll_backs = state["roll_backs"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(self.out, error) from error

    def _take(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["model"][name])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        if self.average is not None:
            self.average.load(state["average"])

    def _sharded_tensors(self) -> dict[str, Tensor]:
        """Everything that is sharded, by names made of a kind, a parameter and a state of it."""
        tensors = {f"model {name}": p.detach() for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer {name} {key}"] = value
        if self.average is not None:
            tensors |= {f"average {n}": value for n, value in self.average.state().items()}
        return tensors

    def _blank(self, name: str) -> Tensor:
        """Make a tensor for one of `_sharded_tensors` to be read into."""
        kind, parameter, *key = name.split(" ")
        if kind == "optimizer" and key == ["step"]:
            return torch.zeros(())
        return torch.zeros_like(self.trained[parameter].detach())

    def _take_sharded(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"model {name}"])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = {}
        owners = {id(p): o for o in self.optimizers for g in o.param_groups for p in g["params"]}
        for name, value in tensors.items():
            kind, of, *key = name.split(" ")
            if kind == "optimizer":
                parameter = self.trained[of]
                owners[id(parameter)].state[parameter][key[0]] = value
        if self.average is not None:
            self.average.load({n: tensors[f"average {n}"] for n in self.trained})

    def gathered_model(self) -> TernaryDecoder:
        """Return the model whole, on the CPU; ranks but the first get one of other weights."""
        if self.ranks.size == 1:
            return self.model.cpu()
        model = _make_model(self.recipe)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, sharded in self.model.named_parameters():
                value = whole(sharded.detach())
                if self.ranks.first:
                    parameters[name].copy_(value)
        return model


def _make_model(recipe: Recipe) -> TernaryDecoder:
    if recipe.adapter is None:
        return initial_model(recipe)
    assert recipe.start is not None  # recipes with an adapter have one
    checkpoint = open_checkpoint(find_model(recipe.start.model, recipe.folder))
    return adapted_model(checkpoint, recipe.adapter)


def _check_sharded(recipe: Recipe) -> None:
    """Refuse what is not computed by several ranks as it is by one.

    Raises:
        ConfigError: names it.
    """
    if recipe.distillation is not None:
        raise ConfigError("[distillation] is computed by one process, not by several ranks")
    if recipe.training.optimizer == "muon":
        raise ConfigError(
            'training.optimizer = "muon" needs whole matrices: it is not computed by several ranks',
            hint='take "adamw"',
        )


def _fingerprint(recipe: Recipe) -> str:
    """What a checkpoint depends on: not how often it is logged, nor how many threads compute."""
    training = dataclasses.replace(
        recipe.training,
        threads=None,
        device="cpu",
        log_every=1,
        evaluate_every=1,
        checkpoint_every=1,
        tensorboard=False,
        picture=False,
    )
    parts = (recipe.tokenizer, recipe.model, recipe.start, recipe.quantization)
    return repr((*parts, recipe.distillation, recipe.adapter, training))
