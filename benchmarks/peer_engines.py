"""The engines that peers.py compares: the commands of one repeat of each, and what they answer."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer_gguf
from peer_repeat import Work, decode_name, prefill_name

HERE = Path(__file__).resolve().parent

PACKAGES = {
    "llama-cpp-python": ("llama-cpp-python", "numpy"),
    "transformers": ("transformers", "torch", "accelerate", "numpy"),
}
"""The distributions that each peer from a package index needs."""

INSTALL = {
    "llama-cpp-python": "CMAKE_ARGS=-DGGML_NATIVE=ON {python} -m pip install"
    " --no-binary llama-cpp-python llama-cpp-python",
    "transformers": "{python} -m pip install -c constraints.txt torch transformers accelerate",
}
"""The line that installs them."""

PROBE = """
import importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(name)
"""

Speeds = dict[str, float]
Answer = tuple[dict[str, Any], Speeds]
"""Facts about an engine, and tokens a second for each kind of work."""


class PeerError(Exception):
    """An engine gave no figures; the message is one line that says why."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine to measure.

    Attributes:
        name: what the results call it.
        commands: the processes of one repeat, one after another.
        parse: reads what each of them wrote to stdout.
    """

    name: str
    commands: list[list[str]]
    parse: Callable[[str], Answer]

    def repeat(self, threads: int, timeout: float) -> Answer:
        """Run one repeat; return what all its processes answered together."""
        about: dict[str, Any] = {}
        speeds: Speeds = {}
        for command in self.commands:
            facts, figures = self.parse(run(command, threads, timeout))
            about |= facts
            speeds |= figures
        return about, speeds


def run(command: list[str], threads: int = 1, timeout: float | None = None) -> str:
    """Return the stdout of a process; whatever goes wrong becomes one line of a PeerError."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )
    except OSError as error:
        raise PeerError(f"cannot run {command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise PeerError(f"took longer than {timeout:g} s (--timeout)") from None
    if done.returncode:
        raise PeerError(f"{ending(done.returncode)}: {last_line(done.stderr)}")
    return done.stdout


def ending(status: int) -> str:
    """Return how a process ended, from its return code."""
    if status >= 0:
        return f"exit status {status}"
    return f"killed by {signal.Signals(-status).name}"


def last_line(text: str) -> str:
    """Return the last line that says something, cut to a readable length."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "nothing on stderr"


def read_json(text: str) -> Any:
    """Return what a process wrote as JSON."""
    try:
        return json.loads(text)
    except ValueError:
        raise PeerError(f"its output is not JSON: {text.strip()[:60]!r}") from None


def parse_repeat(text: str) -> Answer:
    """Read the output of peer_repeat.py; libraries may have written lines before its own."""
    answer = read_json((text.strip().splitlines() or [""])[-1])
    try:
        return dict(answer["about"]), {name: float(x) for name, x in answer["speeds"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise PeerError(f"its JSON holds no speeds: {text.strip()[:60]!r}") from None


def parse_llama_bench(text: str) -> Answer:
    """Read the output of `llama-bench -o json`: a list of tests, one kind of work each."""
    records = read_json(text)
    speeds: Speeds = {}
    about: dict[str, Any] = {}
    try:
        for record in records:
            name = llama_bench_work(record)
            if name is not None:
                speeds[name] = statistics.median(record.get("samples_ts") or [record["avg_ts"]])
            about = {"version": str(record.get("build_commit", "unknown"))}
            about |= {key: record[key] for key in ("model_size", "flash_attn") if key in record}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise PeerError(f"its JSON is not that of llama-bench: {text.strip()[:60]!r}") from None
    return about, speeds


def llama_bench_work(record: dict[str, Any]) -> str | None:
    """Return which kind of work a test was, None = none of ours.

    Two ways to decode at a depth exist: newer programs state it as `n_depth`; in ik_llama.cpp a
    test named tgN@ppD has a prompt of D tokens whose time is not counted.
    """
    tokens, generated = int(record["n_prompt"]), int(record["n_gen"])
    depth = int(record.get("n_depth", 0))
    if generated == 0:
        return prefill_name(tokens) if depth == 0 else None
    if tokens == 0:
        return decode_name(depth)
    return decode_name(tokens) if str(record.get("test", "")).startswith("tg") else None


def missing_packages(python: str, package: str) -> list[str]:
    """Return the distributions that an interpreter lacks for a peer."""
    return run([python, "-c", PROBE, *PACKAGES[package]]).split()


def repeat_command(python: str, engine: str, model: Path, work: Work) -> list[str]:
    """Return the command of one repeat of an engine of peer_repeat.py."""
    return [python, str(HERE / "peer_repeat.py"), engine, str(model), *work.options()]


def python_engine(name: str, python: str, engine: str, model: Path, work: Work) -> Engine:
    """Return an engine that peer_repeat.py runs."""
    return Engine(name, [repeat_command(python, engine, model, work)], parse_repeat)


def ensure_gguf(model: Path, folder: Path, ternary: str, head: str) -> Path:
    """Return the GGUF file in the shape of a checkpoint, written first if it is not there.

    The package `gguf` has to be where bitllm is, whichever interpreter has the peer.
    """
    if missing := run([sys.executable, "-c", PROBE, "gguf"]).split():
        raise PeerError(f"no {', '.join(missing)}; install: {sys.executable} -m pip install gguf")
    path = folder / peer_gguf.file_name(peer_gguf.read_shape(model), ternary, head)
    if not path.exists():
        script = str(HERE / "peer_gguf.py")
        run([sys.executable, script, str(model), str(path), f"--type={ternary}", f"--head={head}"])
    return path


def llama_bench_engine(name: str, program: list[str], model: Path, work: Work) -> Engine:
    """Return an engine that a llama-bench program runs; what it cannot measure stays out."""
    usage = run([*program, "--help"])
    common = [*program, "-m", str(model), "-t", str(work.threads), "-o", "json", "-r", "1"]
    steps = str(work.steps if 0 in work.depths else 0)
    first = [*common, "-p", str(work.prefill), "-n", steps]
    commands = [first]
    deep = [depth for depth in work.depths if depth]
    if deep and "--n-depth" in usage:
        depths = ",".join(map(str, deep))
        commands.append([*common, "-p", "0", "-n", str(work.steps), "-d", depths])
    elif re.search(r"(?<![\w-])-gp\b", usage):  # not -gpu
        for depth in deep:
            first += ["-gp", f"{depth},{work.steps}"]
    return Engine(name, commands, parse_llama_bench)
