"""Writing to the two streams: data to stdout; notes, colours and progress to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import click

__all__ = [
    "emit",
    "emit_json",
    "format_bytes",
    "format_count",
    "note",
    "paint",
    "progress",
    "tolerate_narrow_encodings",
    "use_color",
]

PROGRESS_DELAY_S = 0.3
"""Work that is done sooner than this shows no bar."""


def use_color(stream: TextIO | None = None) -> bool:
    """Whether `stream` (None = stderr) is a terminal whose user did not say no to colours.

    Any value of NO_COLOR that is not empty (https://no-color.org) and TERM=dumb say no.
    """
    stream = sys.stderr if stream is None else stream
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def paint(text: str, color: str) -> str:
    """Return `text` in bold `color` if stderr takes colours, else unchanged."""
    return click.style(text, fg=color, bold=True) if use_color() else text


def note(text: str = "") -> None:
    """Print a line for the person at the terminal, to stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(text: str, *, end: str = "\n") -> None:
    """Write data to stdout and flush it, so that a reader sees each piece as it comes."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def emit_json(value: object) -> None:
    """Write one JSON document to stdout: UTF-8 as it is, no NaN."""
    emit(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def format_bytes(count: int) -> str:
    """Return a size in decimal units with three figures: `45.1 MB`, `1.18 GB`, `512 B`."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def format_count(count: int) -> str:
    """Return a number of things with three figures: `2.41 B`, `3.2 M`, `950`."""
    value, units = float(count), ["", " k", " M", " B", " T"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.3g}{units[0]}"


def tolerate_narrow_encodings() -> None:
    """Let stdout and stderr print `?` for characters that their encoding lacks, not raise."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and stream.errors == "strict":
            reconfigure(errors="replace")


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `advance(done, total)`, which draws a bar on stderr while the block runs.

    Nothing is drawn unless stderr is a terminal and the work outlasts `PROGRESS_DELAY_S`; the bar
    is gone when the block ends. rich is imported only when a bar is drawn.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    bar = _Bar(label)
    try:
        yield bar.advance
    finally:
        bar.close()


class _Bar:
    """A transient progress bar that appears only once the work has taken a while."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = time.monotonic()
        self._stop: Callable[[], None] | None = None
        self._update: Callable[[int, int], None] | None = None

    def advance(self, done: int, total: int) -> None:
        if self._update is None and time.monotonic() - self._start >= PROGRESS_DELAY_S:
            self._draw()
        if self._update is not None:
            self._update(done, total)

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
        )
        bars = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bars.add_task(self._label)
        bars.start()
        self._stop = bars.stop
        self._update = lambda done, total: bars.update(task, completed=done, total=total)

    def close(self) -> None:
        if self._stop is not None:
            self._stop()
