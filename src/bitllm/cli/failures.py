"""What the user sees when something goes wrong, and the exit code that goes with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from bitllm.cli.terminal import note, paint
from bitllm.errors import BitllmError

__all__ = [
    "EXIT_CLOSED",
    "EXIT_FAILURE",
    "EXIT_INTERRUPTED",
    "EXIT_USAGE",
    "CheckFailedError",
    "ending_as_ctrl_c_does",
    "print_error",
    "report",
]

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as a shell reports a program that Ctrl-C ended."""
EXIT_CLOSED = 141
"""128 + SIGPIPE, as a shell reports a program whose reader went away."""


class CheckFailedError(Exception):
    """What a check of `bitllm doctor` found wrong, in words."""


@contextmanager
def ending_as_ctrl_c_does() -> Iterator[None]:
    """Let a request to end, or a terminal that is closed, clean up before the process ends.

    The system's default is to end it at once, which would leave half-written files behind.
    """

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    names = ("SIGTERM", "SIGHUP")
    numbers = [number for name in names if (number := getattr(signal, name, None)) is not None]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def print_error(message: str, hint: str | None = None) -> None:
    """Print `error: message` and, after an empty line, `hint: hint` to stderr."""
    note(f"{paint('error:', 'red')} {message}")
    if hint:
        note(f"\n{paint('hint:', 'cyan')} {hint}")


def report(error: Exception, *, verbose: bool) -> int:
    """Print `error` for a person to read and return the exit code it stands for.

    A deliberate error (`BitllmError`, a wrong command line, a file the system refuses) is a
    message; anything else is a bug and says so. The traceback is shown only if `verbose`.
    """
    if isinstance(error, click.Abort):
        return EXIT_INTERRUPTED
    if isinstance(error, click.ClickException):
        return _report_click(error)
    if verbose:
        import traceback

        note("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, BitllmError):
        print_error(error.message, error.hint)
    elif isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        print_error(f"{where}{error.strerror}")
    else:
        what = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        print_error(
            f"unexpected {what}; this is a bug in bitllm",
            "run it again with --verbose and report the traceback together with the output of"
            " 'bitllm doctor'",
        )
    return EXIT_FAILURE


def _report_click(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    hint = getattr(error, "hint", None)
    if hint is None and context is not None:
        hint = f"'{context.command_path} --help' lists what it takes"
    message = error.format_message().rstrip(".")
    print_error(message[:1].lower() + message[1:], hint)
    return error.exit_code
