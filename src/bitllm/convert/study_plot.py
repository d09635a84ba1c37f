"""The study of `bitllm quantize` as a picture: noise and zeros of every matrix, by bits.

matplotlib is imported here and only when a picture is asked for.
"""

from __future__ import annotations

import math
from pathlib import Path

from bitllm.convert.study import StudyResult, by_bits

__all__ = ["draw"]


def draw(result: StudyResult, file: Path) -> None:
    """Write the picture to a file whose suffix says the kind.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    noise, zeros = figure.subplots(1, 2)
    for bits, reports in by_bits(result.matrices).items():
        places = range(len(reports))
        # A matrix that came through unharmed has no finite height.
        heights = [r.sqnr_db if math.isfinite(r.sqnr_db) else math.nan for r in reports]
        noise.plot(places, heights, marker=".", label=f"{bits} bits")
        zeros.plot(places, [100 * r.zero_fraction for r in reports], marker=".", label=bits)
    noise.set_ylabel("signal to quantisation noise, dB")
    zeros.set_ylabel("weights rounded to zero, %")
    for axes in (noise, zeros):
        axes.set_xlabel("matrix, in the order of layers")
        axes.grid(alpha=0.3)
    noise.legend()
    shared = "tensor" if result.group_size is None else f"group of {result.group_size}"
    shared = "row" if result.granularity == "row" else shared
    figure.suptitle(f"{result.model}: rounding without training, one scale a {shared}")
    figure.savefig(file, dpi=150)
