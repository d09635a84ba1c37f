"""What every benchmark prints beside its figures: the machine, the versions, and memory in use."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def describe() -> dict[str, Any]:
    """Return machine, commit and versions, for a row of results."""
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("bitllm", "numpy")},
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """Return the short commit, "+" appended if tracked files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def memory() -> dict[str, int]:
    """Return resident bytes of this process: anonymous, file-backed, and the sum of both."""
    fields = dict.fromkeys(("RssAnon", "RssFile", "VmRSS"), 0)
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in fields:
            fields[name] = int(value.split()[0]) * 1024
    return {
        "anonymous": fields["RssAnon"],
        "file": fields["RssFile"],
        "resident": fields["VmRSS"],
    }


class PeakMemory:
    """The highest anonymous and file-backed memory while the `with` block runs, sampled each 5 ms.

    The two peaks may belong to different moments; "resident" is the highest sum.
    """

    def __init__(self) -> None:
        self.bytes = memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.sample()

    def sample(self) -> None:
        """Take the present memory into account."""
        for name, value in memory().items():
            self.bytes[name] = max(self.bytes[name], value)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()


def report(rows: list[tuple[str, str]], result: dict[str, Any]) -> None:
    """Print a card for people, then everything as one line of JSON."""
    about = describe()
    width = max(len(label) for label, _ in rows)
    print(f"{about['cpu']}, {about['cpus']} CPUs; commit {about['commit']};", end=" ")
    print(f"bitllm {about['bitllm']}, numpy {about['numpy']}, Python {about['python']}\n")
    for label, value in rows:
        print(f"{label:{width}}  {value}")
    print()
    print(json.dumps({**about, **result}))
