"""A run on the terminal: figures and the curve of the loss, redrawn in place."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bitllm.train.run_log import Progress

__all__ = ["LiveView"]

_BARS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Shows the last figures of a run while it is entered; call it with each `Progress`.

    Args:
        name: of the run.
        console: where to draw, as a rule stderr.
    """

    def __init__(self, name: str, console: Console) -> None:
        self._name, self._console = name, console
        self._losses: list[float] = []
        self._held_out: float | None = None
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Draw the figures of a line of the log."""
        self._losses.append(progress.loss)
        if progress.held_out_bpb is not None:
            self._held_out = progress.held_out_bpb
        curve = Text(loss_curve(self._losses, max(self._console.width - 4, 10)))
        self._live.update(Group(self._figures(progress), curve), refresh=True)

    def _figures(self, progress: Progress) -> Table:
        held_out = "-" if self._held_out is None else f"{self._held_out:.4f} bits/byte"
        figures = {
            "step": f"{progress.step:,} of {progress.steps:,}",
            "loss": f"{progress.loss:.4f} nats/token",
            "held out": held_out,
            "strength of rounding": f"{progress.strength:.3f}",
            "learning rate": f"{progress.learning_rate:.2e}",
            "gradient norm": f"{progress.gradient_norm:.3f}",
            "speed": f"{progress.tokens_per_second:,.0f} tok/s, "
            f"{progress.flops_per_second / 1e9:,.1f} GFLOP/s",
            "time left": f"{progress.seconds_left / 60:.1f} min",
        }
        table = Table(title=self._name, show_header=False, box=None, title_justify="left")
        for name, value in figures.items():
            table.add_row(name, value)
        return table


def loss_curve(losses: list[float], width: int) -> str:
    """Draw losses as one line of bars, at most `width` of them, the last ones exactly."""
    step = -(-len(losses) // width)
    shown = losses[::-1][::step][::-1]
    lowest, highest = min(shown), max(shown)
    span = (highest - lowest) or 1.0
    return "".join(_BARS[round((loss - lowest) / span * (len(_BARS) - 1))] for loss in shown)
