"""Which packing decodes faster here, for one model: measured side by side, and kept for "auto"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

from bitllm.backends.base import LoadOptions
from bitllm.backends.cpu import CpuBackend, CpuDecoder, cpu_info
from bitllm.backends.cpu.tuning import Packing, Tuning, store_tuning
from bitllm.bench.gate import CONTEXT, SEQUENCES, Evidence, evidence, require_equal
from bitllm.bench.needs import nominal_bytes
from bitllm.bench.steps import Sequences
from bitllm.bench.timing import Spread, seconds
from bitllm.formats import open_checkpoint

__all__ = ["Tuned", "tune"]

PACKINGS: tuple[Packing, ...] = get_args(Packing)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was measured and where it is kept.

    Attributes:
        packing: the faster one.
        tokens_per_s: of each packing, the median of the runs.
        spread: of each, (max - min) / median.
        file: which "auto" reads from now on.
    """

    packing: str
    tokens_per_s: dict[str, float]
    spread: dict[str, float]
    file: str


def tune(
    path: Path,
    options: LoadOptions,
    wanted: Evidence,
    *,
    tokens: int,
    repeats: int,
    say: Callable[[str], None],
) -> Tuned:
    """Measure both packings in turns, and keep the result.

    Args:
        path: the model directory.
        options: how it is loaded, but for the packing.
        wanted: what its output has to be.
        tokens: drawn in each run.
        repeats: runs of each packing.
        say: told what is being done.

    Raises:
        MeasurementError: wrong output of a packing.
        OSError: the result cannot be stored.
    """
    samples: dict[str, list[float]] = {packing: [] for packing in PACKINGS}
    with ExitStack() as stack:
        decoders: dict[str, CpuDecoder] = {}
        for packing in PACKINGS:
            say(f"loading with packing {packing}")
            own = dataclasses.replace(
                options, packing=packing, kv_tokens=max(tokens, SEQUENCES * CONTEXT)
            )
            decoders[packing] = CpuBackend().load(open_checkpoint(path), own)
            stack.callback(decoders[packing].close)
            require_equal(evidence(decoders[packing]), wanted, f"packing {packing}")
        say("decoding with both packings in turns")
        for _ in range(repeats):
            for name, decoder in decoders.items():
                sequence = Sequences(decoder, 1, tokens, options.max_batch_tokens)
                samples[name].append(seconds(partial(sequence.decode, 0, tokens)))
        info, spec = decoders["2bit"].info, decoders["2bit"].spec
    runs = {packing: Spread.of(times) for packing, times in samples.items()}
    speeds = {packing: tokens / run.median for packing, run in runs.items()}
    best: Packing = max(PACKINGS, key=speeds.__getitem__)
    file = store_tuning(
        Tuning(
            cpu=cpu_info()["name"],
            isa=info.kernel,
            threads=info.threads,
            ternary_bytes=sum(nominal_bytes(spec, "2bit").values()),
            packing=best,
            tokens_per_s=speeds,
        )
    )
    return Tuned(best, speeds, {name: run.spread for name, run in runs.items()}, str(file))
