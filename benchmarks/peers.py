"""Measure bitllm beside other engines: the same work on the same machine in the same minutes.

    python benchmarks/make_checkpoint.py --shape 2b build/models/2b
    python benchmarks/peers.py build/models/2b

Peers are llama.cpp through llama-cpp-python, on GGUF files of the same shape that this script
writes; transformers, on the same checkpoint; and any llama-bench program, given by `--peer`, on a
file of its own. A peer that is not installed is named with the line that installs it.

    python benchmarks/peers.py build/models/2b --peer ik=PATH/llama-bench MODEL.gguf

One repeat of each engine, then the next repeat of each, so that what slows the machine down slows
all of them; each repeat is a process of its own. A figure is the median of the repeats, its spread
(max - min) / median. A ratio is the median of bitllm / peer within a repeat, with its extremes.
The exit status is 1 if an engine failed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import peer_gguf
from peer_engines import (
    INSTALL,
    PACKAGES,
    Engine,
    PeerError,
    ensure_gguf,
    llama_bench_engine,
    missing_packages,
    python_engine,
)
from peer_repeat import (
    Work,
    add_work,
    decode_name,
    positive,
    prefill_name,
    together_name,
    work_of,
)

from bitllm.backends.cpu import cpu_info
from bitllm.bench.timing import Spread

OURS = "bitllm"


@dataclass(slots=True)
class Field:
    """The engines that take part, and why others do not: by name, in one line."""

    engines: list[Engine] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What the repeats of one engine gave: tokens a second by kind of work, in their order."""

    about: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)


def note(text: str) -> None:
    """Tell whoever waits what happens now."""
    print(text, file=sys.stderr, flush=True)


def gather(arguments: argparse.Namespace, work: Work) -> Field:
    """Return the engines to measure, bitllm first; GGUF files are written where needed."""
    found = Field([python_engine(OURS, sys.executable, OURS, arguments.model, work)])
    for package in arguments.packages:
        try:
            add_package(found, package, arguments, work)
        except PeerError as error:
            found.failed[package] = str(error)
    for (name, program), model in arguments.peer:
        try:
            found.engines.append(llama_bench_engine(name, program, model, work))
        except PeerError as error:
            found.failed[name] = str(error)
    return found


def add_package(found: Field, package: str, arguments: argparse.Namespace, work: Work) -> None:
    """Add the engines of a Python package, or the line that installs it."""
    python = dict(arguments.peer_python).get(package, sys.executable)
    missing = missing_packages(python, package)
    if missing:
        line = INSTALL[package].format(python=python)
        found.skipped[package] = f"no {', '.join(missing)}; install: {line}"
    elif package == "llama-cpp-python":
        add_llama_cpp(found, python, arguments, work)
    else:
        for dtype in arguments.dtypes:
            name = f"{package} {dtype}"
            engine = f"{package}-{dtype}"
            found.engines.append(python_engine(name, python, engine, arguments.model, work))


def add_llama_cpp(found: Field, python: str, arguments: argparse.Namespace, work: Work) -> None:
    """Add llama.cpp with each ternary type."""
    for ternary in arguments.types:
        name = f"llama.cpp {ternary}, {arguments.head} head"
        note(f"GGUF file for {name} ...")
        try:
            path = ensure_gguf(arguments.model, arguments.gguf_dir, ternary, arguments.head)
        except PeerError as error:
            found.failed[name] = str(error)
        else:
            found.engines.append(python_engine(name, python, "llama-cpp-python", path, work))


def alternate(found: Field, work: Work, repeats: int, timeout: float) -> dict[str, Outcome]:
    """Run one repeat of each engine, then the next; an engine that fails runs no more."""
    outcomes = {engine.name: Outcome() for engine in found.engines}
    for index in range(repeats):
        for engine in found.engines:
            if engine.name in found.failed:
                continue
            note(f"repeat {index + 1} of {repeats}: {engine.name} ...")
            try:
                about, speeds = engine.repeat(work.threads, timeout)
            except PeerError as error:
                if engine.name == OURS:
                    raise
                found.failed[engine.name] = str(error)
                continue
            outcome = outcomes[engine.name]
            outcome.about = about
            for name, speed in speeds.items():
                outcome.samples.setdefault(name, []).append(speed)
    return outcomes


def compare(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Return ours / theirs within each repeat: the median and the extremes."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=False)]
    return {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def figures(outcomes: dict[str, Outcome], work: Work) -> list[dict[str, Any]]:
    """Return one row for each kind of work and engine, ours first."""
    kinds = [prefill_name(work.prefill), *map(decode_name, work.depths)]
    kinds += map(together_name, work.sequences)
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        ours = outcomes[OURS].samples.get(kind, [])
        for name, outcome in outcomes.items():
            samples = outcome.samples.get(kind, [])
            row: dict[str, Any] = {"work": kind, "engine": name, "samples": samples}
            if samples:
                speed = Spread.of(samples)
                row |= {"tokens_per_s": speed.median, "spread": speed.spread}
            if samples and ours and name != OURS:
                row |= compare(ours, samples)
            rows.append(row)
    return rows


def card(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures as labelled lines, and then who did not take part."""
    sizes = [f"{name} {size}" for name, size in result["shape"].items()]
    lines = [
        ("model", ", ".join([result["model"], *sizes])),
        (
            "work",
            f"{result['threads']} threads, {result['steps']} tokens a decode run,"
            f" {result['repeats']} repeats in alternation",
        ),
    ]
    lines += [(f"{row['work']}, {row['engine']}", figure(row)) for row in result["figures"]]
    lines += [(f"skipped: {name}", why) for name, why in result["skipped"].items()]
    lines += [(f"failed: {name}", why) for name, why in result["failed"].items()]
    return lines


def figure(row: dict[str, Any]) -> str:
    """Return the figures of a row for people."""
    if not row["samples"]:
        return "not measured"
    text = f"{row['tokens_per_s']:.2f} tok/s (spread {row['spread']:.1%})"
    if "ratio" in row:
        text += f"; bitllm/peer {row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
    return text


def named_python(text: str) -> tuple[str, str]:
    """Read NAME=PATH of `--peer-python`."""
    name, _, path = text.partition("=")
    if name not in PACKAGES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PACKAGES)}")
    if shutil.which(path) is None:
        raise argparse.ArgumentTypeError(f"no program {path!r}")
    return name, path


class PeerAction(argparse.Action):
    """Reads the two values of `--peer`: NAME=PROGRAM, and the model that it is to run."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Append ((name, program with its options), model)."""
        name, _, text = values[0].partition("=")
        program, model = shlex.split(text), Path(values[1])
        if not name or not program:
            parser.error(f"--peer needs NAME=PROGRAM, not {values[0]!r}")
        if shutil.which(program[0]) is None:
            parser.error(f"--peer {name}: no program {program[0]!r}")
        if not model.is_file():
            parser.error(f"--peer {name}: no model file {model}")
        namespace.peer = [*namespace.peer, ((name, program), model)]


def parse_arguments() -> argparse.Namespace:
    """Read the command line, and check what can be checked before anything runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a model directory")
    add_work(parser)
    parser.set_defaults(threads=cpu_info()["physical_cores"])
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--timeout", type=positive, default=3600, metavar="SECONDS")
    parser.add_argument(
        "--packages",
        nargs="*",
        choices=PACKAGES,
        default=list(PACKAGES),
        help="the peers from a package index to compare with; default: all",
    )
    parser.add_argument(
        "--peer-python",
        type=named_python,
        action="append",
        default=[],
        metavar="PACKAGE=PYTHON",
        help="the interpreter that has this package, if it is not the one that runs bitllm",
    )
    parser.add_argument(
        "--peer",
        action=PeerAction,
        nargs=2,
        default=[],
        metavar=("NAME=PROGRAM", "MODEL"),
        help="a llama-bench program, options of its own after it if quoted, and its model file",
    )
    parser.add_argument(
        "--types",
        nargs="+",
        choices=peer_gguf.TERNARY_TYPES,
        default=list(peer_gguf.TERNARY_TYPES),
        help="ternary types of the GGUF files; default: all",
    )
    parser.add_argument("--head", choices=peer_gguf.HEAD_TYPES, default="Q6_K")
    parser.add_argument("--gguf-dir", type=Path, default=Path("build/models/gguf"))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bf16", "fp32"), default=["bf16"], help="of transformers"
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the line of JSON")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(
            f"no model directory {arguments.model}; write one:"
            f" python benchmarks/make_checkpoint.py --shape 2b {arguments.model}"
        )
    try:
        arguments.shape = peer_gguf.read_shape(arguments.model)
    except (KeyError, TypeError, ValueError) as error:
        parser.error(f"{arguments.model / 'config.json'} states no shape: {error!r}")
    return arguments


def main() -> int:
    """Measure and print; return the exit status."""
    arguments = parse_arguments()
    work = work_of(arguments)
    try:
        found = gather(arguments, work)
        outcomes = alternate(found, work, arguments.repeats, arguments.timeout)
    except PeerError as error:
        note(f"peers.py: bitllm: {error}")
        return 1
    result = {
        "benchmark": "peers",
        "model": arguments.model.name,
        "shape": dataclasses.asdict(arguments.shape),
        "threads": work.threads,
        "steps": work.steps,
        "repeats": arguments.repeats,
        "engines": {name: outcome.about for name, outcome in outcomes.items()},
        "figures": figures(outcomes, work),
        "skipped": found.skipped,
        "failed": found.failed,
    }
    if arguments.json:
        print(json.dumps({**machine.describe(), **result}))
    else:
        machine.report(card(result), result)
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
