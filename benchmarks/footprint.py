"""Measure what bitllm costs before it does anything: memory and time of a fresh process.

    python benchmarks/footprint.py

Reports the resident memory of a process with `import bitllm` and with the demo model's engine ready
(one token written), the time `import bitllm` takes beyond NumPy's own, and the time of
`bitllm --help`. Each figure is the median of `--repeats` fresh processes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine

RESIDENT = """
for line in open("/proc/self/status"):
    if line.startswith(("RssAnon", "RssFile")):
        print(int(line.split()[1]) * 1024)
"""
PROGRAMS = {
    "python": "",
    "import numpy": "import numpy",
    "import bitllm": "import bitllm",
    "demo engine ready": "import bitllm; llm = bitllm.load(); llm.generate('a', max_tokens=1)",
}


def resident(program: str) -> tuple[int, int]:
    """Return anonymous and file-backed bytes of a fresh interpreter that ran `program`."""
    found = subprocess.run(
        [sys.executable, "-c", program + RESIDENT], capture_output=True, text=True, check=True
    )
    anonymous, file = map(int, found.stdout.split()[-2:])
    return anonymous, file


def import_seconds(module: str) -> float:
    """Return how long a fresh interpreter takes to import `module`."""
    program = (
        "import time; began = time.perf_counter();"
        f" import {module}; print(time.perf_counter() - began)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(found.stdout)


def help_seconds() -> float:
    """Return how long `bitllm --help` takes, from outside."""
    command = Path(sys.executable).with_name("bitllm")
    began = time.perf_counter()
    subprocess.run([command, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    repeats = range(parser.parse_args().repeats)
    memory = {}
    for name, program in PROGRAMS.items():
        samples = [resident(program) for _ in repeats]
        memory[name] = {
            "anonymous": statistics.median(anonymous for anonymous, _ in samples),
            "file": statistics.median(file for _, file in samples),
        }
    numpy_s = statistics.median(import_seconds("numpy") for _ in repeats)
    bitllm_s = statistics.median(import_seconds("bitllm") for _ in repeats)
    help_s = statistics.median(help_seconds() for _ in repeats)
    rows = [
        (
            f"memory, {name}",
            f"{(used['anonymous'] + used['file']) / machine.MIB:.1f} MiB"
            f" (anonymous {used['anonymous'] / machine.MIB:.1f},"
            f" file-backed {used['file'] / machine.MIB:.1f})",
        )
        for name, used in memory.items()
    ]
    rows += [
        ("import bitllm", f"{1e3 * bitllm_s:.0f} ms, NumPy alone {1e3 * numpy_s:.0f} ms"),
        ("bitllm --help", f"{1e3 * help_s:.0f} ms"),
    ]
    machine.report(
        rows,
        {
            "benchmark": "footprint",
            "memory": memory,
            "import_s": bitllm_s,
            "import_numpy_s": numpy_s,
            "help_s": help_s,
        },
    )


if __name__ == "__main__":
    main()
