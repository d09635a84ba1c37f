"""Processes that a test interrupts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def unmeasured() -> dict[str, str]:
    """The environment without what makes a process measure its coverage.

    An interrupt that lands inside coverage leaves its lock taken, and the process then waits for it
    for ever.
    """
    return {name: v for name, v in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}


@contextmanager
def process_to_interrupt(command: Sequence[str], **pipes: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed if the test leaves it running."""
    with subprocess.Popen(command, env=unmeasured(), **pipes) as process:
        try:
            yield process
        finally:
            process.kill()
