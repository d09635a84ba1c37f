"""What stands beside every figure: the machine, the versions, the commit, and memory in use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import bitllm
from bitllm.backends.cpu import resident_bytes, resident_file_bytes

__all__ = ["MIB", "PeakMemory", "describe", "memory"]

MIB = 2**20


def describe() -> dict[str, Any]:
    """Return CPU, system, commit and versions, for a row of results."""
    return {
        "cpu": _cpu_name(),
        "cpus": _usable_cpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "bitllm": bitllm.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _commit() -> str | None:
    """Return the short commit of a source tree, "+" if files differ from it; None elsewhere."""
    root = Path(bitllm.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def memory() -> dict[str, int]:
    """Return resident bytes of this process: anonymous, file-backed, and the sum of both.

    All 0 where the system does not tell.
    """
    resident, file = resident_bytes(), resident_file_bytes()
    return {"anonymous": resident - file, "file": file, "resident": resident}


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
