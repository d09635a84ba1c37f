"""The state of a chat: its messages, and the commands that change them."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from bitllm.cli.answer import Answer
from bitllm.cli.failures import print_error
from bitllm.cli.terminal import note

__all__ = ["COMMANDS", "Conversation", "Message"]

Message = dict[str, str]

COMMANDS = {
    "/help": "show this",
    "/system TEXT": "set the system message and start again; without TEXT, show it",
    "/regenerate": "answer the last message once more",
    "/undo": "forget the last message and its answer",
    "/clear": "forget the conversation, keep the system message",
    "/exit": "leave",
}
"""What a line that begins with a slash can ask for, with its help."""

KEYS = {
    "//TEXT": "send /TEXT as a message",
    "Enter": "send; after a backslash, begin a new line",
    "Alt-Enter": "new line; pasted text keeps its lines",
    "Up, Down": "what was typed before",
    "Ctrl-C": "stop the answer, or drop what is typed",
    "Ctrl-D": "leave",
}
"""What the keys do on a terminal."""


class Conversation:
    """Takes what a person types, line by line, and keeps the messages.

    Args:
        ask: shows the model's answer to the messages and returns it; its second argument counts
            how often these messages were answered before.
        system: the system message, None for none.
    """

    def __init__(self, ask: Callable[[list[Message], int], Answer], system: str | None) -> None:
        self._ask = ask
        self._system = system
        self._attempts = 0
        self.messages: list[Message] = []
        self._clear()

    def handle(self, line: str) -> bool:
        """Answer a message or obey a command; return False if the chat is to end.

        Raises:
            BitllmError: the model cannot answer; the message is not kept.
        """
        if line.startswith("/") and not line.startswith("//"):
            return self._command(line)
        content = line.removeprefix("/") if line.startswith("//") else line
        if content.strip():
            self._attempts = 0
            self._answer([*self.messages, {"role": "user", "content": content}])
        return True

    def _answer(self, asked: list[Message]) -> None:
        """Ask; only if there is an answer, question and answer become part of the chat."""
        answer = self._ask(asked, self._attempts)
        self._attempts += 1
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]

    def _command(self, line: str) -> bool:
        name, _, argument = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._help(),
            "/system": self._set_system,
            "/regenerate": lambda _: self._regenerate(),
            "/undo": lambda _: self._undo(),
            "/clear": lambda _: self._clear(),
        }
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name in commands:
            commands[name](argument.strip())
            return True
        close = difflib.get_close_matches(name, [*commands, "/exit"], n=1)
        hint = f"did you mean {close[0]}?" if close else "/help lists the commands"
        print_error(f"no such command: {name}", f"{hint} To send it as a message, type /{line}")
        return True

    def _help(self) -> None:
        for entry, summary in (*COMMANDS.items(), *KEYS.items()):
            note(f"  {entry:<14} {summary}")

    def _set_system(self, text: str) -> None:
        if text:
            self._system = text
            self._clear()
        else:
            note(self._system or "no system message")

    def _clear(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def _undo(self) -> None:
        if self._answered():
            del self.messages[-2:]
        else:
            note("nothing to undo")

    def _regenerate(self) -> None:
        if self._answered():
            self._answer(self.messages[:-1])
        else:
            note("nothing to answer yet")

    def _answered(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"
