"""`bitllm doctor`: what this machine is, and whether bitllm computes correctly on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import click

from bitllm.cli.failures import EXIT_FAILURE
from bitllm.cli.options import is_verbose, json_option, verbose_option
from bitllm.cli.terminal import emit, emit_json, progress

__all__ = ["doctor"]


@click.command()
@json_option
@verbose_option
@click.pass_context
def doctor(ctx: click.Context, /, as_json: bool) -> None:
    """Check this machine: kernels, speed, versions, demo model.

    Each kernel set must give the bits of the NumPy reference, and the demo model must write; if one
    fails, the exit code is 1. The output is made to be pasted into a bug report: it holds no
    tokens, keys or user names.
    """
    from bitllm.cli import machine
    from bitllm.cli.checks import run_checks

    facts: dict[str, Any] = {}
    with progress("examining this machine") as advance:
        parts = (
            ("versions", machine.versions),
            ("cpu", machine.processor),
            ("kernels", machine.kernel_sets),
            ("device", machine.device),
            ("mlx", machine.mlx_device),
            ("memory", machine.memory),
            ("storage", machine.storage),
            ("environment", machine.environment),
            ("checks", lambda: run_checks(verbose=is_verbose(ctx))),
        )
        for done, (name, examine) in enumerate(parts):
            advance(done, len(parts))
            facts[name] = examine()
    healthy = all(check.passed for check in facts["checks"])
    facts["checks"] = [dataclasses.asdict(check) for check in facts["checks"]]
    if as_json:
        emit_json({**facts, "healthy": healthy})
    else:
        emit("\n".join(_lines(facts, healthy)))
    if not healthy:
        raise click.exceptions.Exit(EXIT_FAILURE)


def _lines(facts: Mapping[str, Any], healthy: bool) -> Iterator[str]:
    from bitllm.engine.memory_plan import format_bytes

    versions, cpu, storage = facts["versions"], facts["cpu"], facts["storage"]
    system = versions.pop("system")
    yield "versions   " + ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"system     {system}"
    if cpu is not None:
        features = [name for name, present in cpu["features"].items() if present]
        yield f"cpu        {cpu['name']}"
        yield f"           {cpu['physical_cores']} cores, {cpu['usable_cpus']} CPUs may be used"
        yield f"           {' '.join(features) or 'none of the features that kernels use'}"
    yield f"device     {facts['device']['name']} ({facts['device']['reason']})"
    yield from _table(
        "kernels", ((kernel["name"], kernel["reason"]) for kernel in facts["kernels"])
    )
    yield from _mlx_lines(facts["mlx"])
    available = facts["memory"]["available"]
    yield f"memory     {'unknown' if available is None else format_bytes(available)} available"
    for threads, speed in facts["memory"]["bandwidth"].items():
        word = "thread" if threads == "1" else "threads"
        yield f"           {format_bytes(int(speed))}/s read by {threads} {word}"
    yield f"cache      {storage['cache']}, {format_bytes(storage['free'])} free"
    yield from _table("set", facts["environment"].items())
    yield ""
    for check in facts["checks"]:
        verdict = "PASS" if check["passed"] else "FAIL"
        yield f"{verdict}  {check['name']:<18} {check['detail']} ({check['seconds']:.1f} s)"
    yield ""
    yield "all checks passed" if healthy else "SOMETHING IS WRONG: see FAIL above"


def _mlx_lines(mlx: Mapping[str, Any] | None) -> Iterator[str]:
    from bitllm.engine.memory_plan import format_bytes

    if mlx is None:
        return
    kind = "through Metal" if mlx["metal"] else "no Metal: MLX runs on the CPU, slowly"
    yield f"mlx        {mlx['name']} ({kind})"
    if mlx["working_set"] is not None:
        total = "" if mlx["memory"] is None else f" of {format_bytes(mlx['memory'])}"
        yield f"           {format_bytes(mlx['working_set'])}{total} for the GPU"


def _table(label: str, rows: Iterator[tuple[str, str]] | Any) -> Iterator[str]:
    for index, (name, value) in enumerate(rows):
        yield f"{label if index == 0 else '':<10} {name:<12} {value}"
