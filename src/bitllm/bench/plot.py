"""The result of a measurement as a picture: the roofline with every figure below it, and tok/s.

matplotlib is imported here and only when a picture is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitllm.bench.model import SpeedRow
from bitllm.bench.run import BenchResult
from bitllm.errors import ConfigError

__all__ = ["draw", "require_matplotlib"]

COLORS = {"prefill": "tab:blue", "decode": "tab:orange"}


def require_matplotlib(file: Path) -> None:
    """Refuse early what could not be drawn after minutes of measuring.

    Raises:
        ConfigError: matplotlib is missing, cannot write files of that kind, or the directory is
            not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"a picture needs matplotlib, which cannot be imported: {error}",
            hint="install it with `pip install 'bitllm[plots]'`",
        ) from error
    kinds = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise ConfigError(
            f"{file}: no picture can be written as {file.suffix or 'a file without suffix'}",
            hint=f"choose one of {', '.join('.' + kind for kind in sorted(kinds))}",
        )
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: there is no such directory")


def draw(result: BenchResult, file: Path) -> None:
    """Write the picture to a file whose suffix says the kind.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    roof, bars = figure.subplots(1, 2)
    _roofline(roof, result)
    _speeds(bars, result)
    figure.suptitle(
        f"{result.model} on {result.machine['cpu']}: {result.kernel}, {result.threads} threads,"
        f" {result.packing}, head {result.head}"
    )
    figure.savefig(file, dpi=150)


def _roofline(axes: Any, result: BenchResult) -> None:
    """Draw multiplications a second over multiplications for each byte read."""
    limits = result.limits
    densities = [row.ternary / row.bytes_read for row in result.speed]
    ridge = limits.multiplications / limits.bandwidth
    low, high = min([ridge, *densities]) / 4, max([ridge, *densities]) * 4
    xs = [low, ridge, high]
    ys = [min(limits.multiplications, limits.bandwidth * x) / 1e9 for x in xs]
    axes.plot(xs, ys, color="black", label="limits, measured")
    for work, color in COLORS.items():
        rows = [row for row in result.speed if row.work == work]
        axes.scatter(
            [row.ternary / row.bytes_read for row in rows],
            [row.rates.ternary_per_s / 1e9 for row in rows],
            color=color,
            label=work,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("int8 multiplications for each byte read")
    axes.set_ylabel("GMAC/s")
    axes.set_title("roofline")
    axes.legend()
    axes.grid(which="both", alpha=0.3)


def _speeds(axes: Any, result: BenchResult) -> None:
    rows = result.speed
    places = range(len(rows))
    speeds = [row.tokens_per_s for row in rows]
    axes.barh(
        places,
        speeds,
        xerr=[speed * row.spread / 2 for speed, row in zip(speeds, rows, strict=True)],
        color=[COLORS[row.work] for row in rows],
    )
    axes.set_yticks(places, [_name(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second; bars show half of (max - min) to each side")
    axes.set_title("speed")


def _name(row: SpeedRow) -> str:
    place = "" if row.work == "prefill" else f" at {row.depth}"
    return f"{row.work} {row.tokens}{place}, batch {row.batch}"
