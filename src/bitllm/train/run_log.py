"""What a run tells: a CSV file, figures for TensorBoard, and a picture of the curves."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitllm.errors import BackendUnavailableError

__all__ = ["LOG_NAME", "PICTURE_NAME", "Progress", "TensorBoard", "draw_curves", "write_csv"]

LOG_NAME, PICTURE_NAME = "log.csv", "curves.png"
COLUMNS = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "held_out_bpb")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, after a line of its log.

    Attributes:
        step: steps done.
        steps: steps there are.
        loss: mean over the steps since the last line, in nats per token.
        learning_rate: of the last step.
        gradient_norm: of the last step, before clipping.
        strength: of the rounding, 0 to 1.
        tokens_per_second: since the run was started or resumed.
        flops_per_second: of the products with weights: 6 a weight and token.
        seconds_left: at this speed.
        held_out_bpb: bits per byte of held-out text, None where it was not measured.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    strength: float
    tokens_per_second: float
    flops_per_second: float
    seconds_left: float
    held_out_bpb: float | None = None

    def __str__(self) -> str:
        measured = self.held_out_bpb is not None
        held_out = f"  held out {self.held_out_bpb:.4f} bits/byte" if measured else ""
        strength = f"  strength {self.strength:.3f}" if self.strength < 1 else ""
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.4f}{held_out}{strength}  "
            f"{self.tokens_per_second:.0f} tok/s  {self.flops_per_second / 1e9:.1f} GFLOP/s  "
            f"{self.seconds_left / 60:.1f} min left"
        )


def write_csv(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all lines of the log; the file is whole at any moment."""
    path = folder / LOG_NAME
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


class TensorBoard:
    """Writes the figures of a run where TensorBoard finds them, `folder`/tensorboard.

    Raises:
        BackendUnavailableError: the package `tensorboard` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BackendUnavailableError(
                "training.tensorboard needs the package tensorboard, which is not installed",
                hint="pip install tensorboard, or leave the key out: log.csv has the same figures",
            ) from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def add(self, progress: Progress) -> None:
        """Write one line of the log."""
        for name in ("loss", "learning_rate", "gradient_norm", "strength", "held_out_bpb"):
            value = getattr(progress, name)
            if value is not None:
                self._writer.add_scalar(name, value, progress.step)
        self._writer.flush()


def draw_curves(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Draw loss, held-out bits per byte and learning rate over the steps, `folder`/curves.png.

    Raises:
        BackendUnavailableError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            "training.picture needs Matplotlib, which is not installed",
            hint='pip install "bitllm[plots]", or leave the key out',
        ) from error
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    steps = [row["step"] for row in rows]
    above.plot(steps, [row["loss"] for row in rows], label="training, nats per token")
    measured = [row for row in rows if row["held_out_bpb"] != ""]
    if measured:
        bits = [row["held_out_bpb"] for row in measured]
        above.plot([r["step"] for r in measured], bits, "o-", label="held out, bits per byte")
    above.legend()
    above.set_ylabel("loss")
    below.plot(steps, [row["learning_rate"] for row in rows], color="tab:gray")
    below.set(xlabel="step", ylabel="learning rate")
    path = folder / PICTURE_NAME
    temporary = path.with_name(f"unfinished-{path.name}")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
    return path
