"""Writing to the two streams: data to stdout; notes, colours and progress to stderr."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "emit",
    "emit_json",
    "format_count",
    "note",
    "paint",
    "progress",
    "tolerate_narrow_encodings",
    "use_color",
    "waiting",
]

PROGRESS_DELAY_S = 0.3
"""Work that is done sooner shows no bar."""


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
    """Yield `advance(done, total)`, which draws a bar on stderr for work that can be counted.

    Nothing is drawn unless stderr is a terminal and the work outlasts `PROGRESS_DELAY_S`; what is
    drawn is gone when the block ends. rich is imported only to draw.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    bar = _Bar(label)
    try:
        yield bar.advance
    finally:
        bar.close()


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """Show a moving bar on stderr while the block runs, by the same rules as `progress`."""
    if not sys.stderr.isatty():
        yield
        return
    bar = _Bar(label)
    timer = threading.Timer(PROGRESS_DELAY_S, bar.draw)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        bar.close()


class _Bar:
    """A transient bar, drawn once by whichever thread comes first and never after `close`."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._closed = False
        self._bars: Progress | None = None

    def advance(self, done: int, total: int) -> None:
        """Say that `done` of `total` pieces are finished."""
        if self._bars is None and time.monotonic() - self._start >= PROGRESS_DELAY_S:
            self.draw()
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=done, total=total)

    def draw(self) -> None:
        """Begin to show the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with self._lock:
            if self._bars is None and not self._closed:
                self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
                self._bars.add_task(self._label, total=None)
                self._bars.start()

    def close(self) -> None:
        """Remove the bar."""
        with self._lock:
            self._closed = True
            if self._bars is not None:
                self._bars.stop()
