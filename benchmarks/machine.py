"""How the scripts here print: a card for people, then everything as one line of JSON."""

from __future__ import annotations

import json
from typing import Any

from bitllm.bench.machine import MIB, PeakMemory, describe, memory

__all__ = ["MIB", "PeakMemory", "describe", "memory", "report"]


def report(rows: list[tuple[str, str]], result: dict[str, Any]) -> None:
    """Print machine and versions, the labelled figures, and the line of JSON."""
    about = describe()
    width = max(len(label) for label, _ in rows)
    print(f"{about['cpu']}, {about['cpus']} CPUs; commit {about['commit']};", end=" ")
    print(f"bitllm {about['bitllm']}, numpy {about['numpy']}, Python {about['python']}\n")
    for label, value in rows:
        print(f"{label:{width}}  {value}")
    print()
    print(json.dumps({**about, **result}))
