"""Text that commands read: whole files, and stdin."""

from __future__ import annotations

import sys
import threading
from typing import BinaryIO

from bitllm.cli.terminal import note
from bitllm.errors import ConfigError

__all__ = ["MOST_BYTES", "STDIN", "read_file", "read_piped"]

STDIN = "-"
"""The name of a file that means stdin, as everywhere."""

MOST_BYTES = 256 * 2**20
"""More than any model reads in a day; a device or a wrong file must not fill the memory."""

STDIN_PATIENCE_S = 3.0
"""A stdin that stays silent for this long is mentioned: it may be open by mistake."""


def read_file(path: str) -> str:
    """Return the text of a UTF-8 file, or of stdin for `-`, without a byte order mark.

    Raises:
        ConfigError: it is no UTF-8, or too long.
        OSError: the system refuses to read it.
    """
    if path == STDIN:
        return _read_stdin()
    with open(path, "rb") as file:
        return _text(file, path)


def read_piped() -> str | None:
    """Return all of stdin; None if a person sits at it, or there is none.

    Raises:
        ConfigError: as `read_file`.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return None
    return _read_stdin()


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ConfigError("there is no stdin to read", hint="name a file")
    reminder = threading.Timer(
        STDIN_PATIENCE_S, note, ["waiting for the end of stdin (`< /dev/null` if there is none)"]
    )
    reminder.daemon = True
    if not sys.stdin.isatty():
        reminder.start()
    try:
        return _text(sys.stdin.buffer, "stdin")
    finally:
        reminder.cancel()


def _text(file: BinaryIO, name: str) -> str:
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"{name}: longer than the {MOST_BYTES // 2**20} MiB that are read at most",
            hint="give a part of it",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name}: not UTF-8 text, by its byte {error.start}",
            hint="convert it, for example with `iconv -f latin1 -t utf-8`",
        ) from error
