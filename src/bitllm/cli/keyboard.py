"""Where the messages of a chat come from: a person at a terminal, or lines on stdin."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bitllm.cli.terminal import note

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

__all__ = ["default_history", "is_interactive", "read_lines", "read_typed"]


def is_interactive() -> bool:
    """Whether a person types: stdin and stderr, which shows the prompt, are both terminals."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def default_history() -> Path:
    """Return the file that remembers what was typed: XDG_STATE_HOME/bitllm/chat-history."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "bitllm" / "chat-history"


def read_lines() -> Iterator[str]:
    """Yield each line of stdin, without its end, as a message of its own."""
    if sys.stdin is not None:
        for line in sys.stdin:
            yield line.removesuffix("\n").removesuffix("\r")


def read_typed(history: Path, words: Iterable[str]) -> Iterator[str]:
    """Yield what a person types, message by message, until Ctrl-D.

    Args:
        history: file that remembers the messages from one chat to the next.
        words: commands offered for completion.
    """
    session = _session(history, words)
    while True:
        try:
            yield session.prompt(">>> ")
        except KeyboardInterrupt:
            note("Ctrl-D or /exit leaves the chat")
        except EOFError:
            return


def _session(history: Path, words: Iterable[str]) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.output import create_output

    return PromptSession(
        multiline=True,
        prompt_continuation="... ",
        key_bindings=_keys(),
        history=_open_history(history),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        # The prompt is no data: stdout may be a file.
        output=create_output(stdout=sys.stderr),
    )


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _open_history(path: Path) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        note(f"what you type is not remembered: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(str(path))
