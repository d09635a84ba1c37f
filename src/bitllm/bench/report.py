"""The result of a measurement as text: plain, aligned, units in every head of a column."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bitllm.bench.model import HeadUse, SpeedRow, StageRow
from bitllm.bench.run import BenchResult

__all__ = ["report_lines", "table"]

LABEL = 13
SPEED_HEAD = (
    "work",
    "batch",
    "depth",
    "tok/s",
    "spread",
    "MB",
    "GB/s",
    "of read",
    "GMAC/s",
    "of int8",
    "",
)


def report_lines(result: BenchResult) -> Iterator[str]:
    """Yield the lines of the whole report."""
    yield from _facts(result)
    cpu = result.backend == "cpu"
    if result.speed:
        yield ""
        yield from table(
            SPEED_HEAD if cpu else [head.replace("of int8", "of peak") for head in SPEED_HEAD],
            [_speed_cells(row) for row in result.speed],
        )
    for work in dict.fromkeys(row.work for row in result.stages):
        yield ""
        yield f"stages of {'a token' if work == 'decode' else 'the prompt'} ({work})"
        yield from table(
            ("stage", "us", "share", "MB", "GB/s", "of read", "MMAC", "GMAC/s", "of int8"),
            [_stage_cells(row) for row in result.stages if row.work == work],
        )
    if result.operations:
        yield ""
        yield "quantised operations a second: quantise, ternary mat-vec, rescale"
        yield from table(
            ("size", "packing", f"native x{result.threads}", "spread", "bitllm.ops", "spread"),
            [
                (
                    f"{row.size} x {row.size}",
                    row.packing,
                    f"{row.native:,.0f}",
                    _percent(row.native_spread),
                    f"{row.python:,.0f}",
                    _percent(row.python_spread),
                )
                for row in result.operations
            ],
        )
    if result.latency:
        yield ""
        yield "latency of a token, us"
        yield from table(
            ("model", "native step", "spread", "LLM.generate", "spread"),
            [
                (
                    f"{row.model} random",
                    f"{1e6 * row.native_s:.1f}",
                    _percent(row.native_spread),
                    f"{1e6 * row.public_s:.1f}",
                    _percent(row.public_spread),
                )
                for row in result.latency
            ],
        )
    if result.tuned is not None:
        yield ""
        yield f"faster packing: {result.tuned.packing}, kept in {result.tuned.file}"
        yield from table(
            ("packing", "tok/s", "spread"),
            [
                (name, _figure(speed), _percent(result.tuned.spread[name]))
                for name, speed in result.tuned.tokens_per_s.items()
            ],
        )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield lines of aligned columns: the first to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        yield "  ".join(cells).rstrip()


def _facts(result: BenchResult) -> Iterator[str]:
    machine, limits, loading = result.machine, result.limits, result.loading
    commit = f" ({machine['commit']})" if machine["commit"] else ""
    peak = result.peak_memory
    yield _fact("machine", f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['system']}")
    yield _fact(
        "versions",
        f"bitllm {machine['bitllm']}{commit}, NumPy {machine['numpy']}, Python {machine['python']}",
    )
    yield _fact(
        "model",
        f"{result.model}: kernels {result.kernel}, {result.threads} threads, packing"
        f" {result.packing}, head {result.head}, KV cache {result.kv_dtype}",
    )
    cpu = result.backend == "cpu"
    same = "equal to that of the scalar kernels"
    yield _fact("output", same if cpu else f"{same}, up to the order of float sums")
    yield _fact(
        "limits",
        f"{_figure(limits.bandwidth / 1e9)} GB/s read from {_figure(limits.buffer / 1e6)} MB,"
        f" {_figure(limits.multiplications / 1e9)} GMAC/s in {'int8' if cpu else 'float'}",
    )
    tokenizer = "no tokenizer"
    if loading.tokenizer_s is not None:
        tokenizer = f"tokenizer {loading.tokenizer_s:.3f} s more"
    yield _fact("load", f"{loading.seconds:.3f} s (spread {_percent(loading.spread)}), {tokenizer}")
    yield _fact(
        "peak memory",
        f"{_mb(peak['resident'])}: {_mb(peak['anonymous'])} anonymous,"
        f" {_mb(peak['file'])} file-backed",
    )
    yield _fact(
        "of the model",
        f"weights {_mb(loading.weight_bytes)}, KV cache up to {_mb(loading.kv_bytes)},"
        f" scratch {_mb(loading.scratch_bytes)}",
    )
    yield from _head_fact(row.head for row in result.speed if row.work == "decode")


def _head_fact(uses: Iterable[HeadUse]) -> Iterator[str]:
    uses = list(uses)
    if any(use.exact_rows for use in uses):
        rows = sum(use.exact_rows for use in uses) / len(uses)
        falls = sum(use.fallbacks for use in uses) / len(uses)
        yield _fact("head", f"{rows:.0f} exact rows a step, whole head in {_percent(falls)}")


def _fact(label: str, text: str) -> str:
    return f"{label:<{LABEL}} {text}"


def _speed_cells(row: SpeedRow) -> tuple[str, ...]:
    rates = row.rates
    return (
        f"{row.work} {row.tokens}",
        str(row.batch),
        str(row.depth),
        _figure(row.tokens_per_s),
        _percent(row.spread),
        _figure(row.bytes_read / 1e6),
        _figure(rates.bytes_per_s / 1e9),
        _percent(rates.bandwidth_fraction),
        _figure(rates.ternary_per_s / 1e9),
        _percent(rates.peak_fraction),
        "IMPOSSIBLE" if row.impossible else "",
    )


def _stage_cells(row: StageRow) -> tuple[str, ...]:
    need, rates = row.need, row.rates
    reads = need.nbytes > 0
    return (
        row.stage,
        _figure(1e6 * row.seconds),
        _percent(row.fraction),
        _figure(need.nbytes / 1e6) if reads else "",
        _figure(rates.bytes_per_s / 1e9) if reads else "",
        _percent(rates.bandwidth_fraction) if reads else "",
        _figure((need.ternary + need.dense) / 1e6) if need.ternary or need.dense else "",
        _figure(rates.ternary_per_s / 1e9) if need.ternary else "",
        _percent(rates.peak_fraction) if need.ternary else "",
    )


def _figure(value: float) -> str:
    """Return a number with about three figures, and no exponent."""
    if value >= 99.95 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if fraction < 0.0995 else f"{100 * fraction:.0f} %"


def _mb(size: float) -> str:
    return f"{_figure(size / 1e6)} MB"
