"""Streamed text in which a tool call may begin: what may be shown, and what has to wait."""

from __future__ import annotations

__all__ = ["HeldCalls", "text_beside_calls"]

_OPEN = "<tool_call>"
_WHOLE = ("{", "[", "<|python_tag|>")
"""How an answer begins that may be nothing but a call."""


class HeldCalls:
    """Holds back what may be a tool call until the answer has ended.

    Args:
        forced: the whole answer is a call.
    """

    def __init__(self, *, forced: bool) -> None:
        self._begun = False
        self._holding = forced
        self._held = ""

    def push(self, text: str) -> str:
        """Return what may be shown now that `text` has come."""
        self._held += text
        if self._holding:
            return ""
        if not self._begun:
            start = self._held.lstrip()
            if not start or any(whole.startswith(start) for whole in _WHOLE):
                # Nothing but white space, or what a call may begin with.
                self._holding = start in _WHOLE
                return ""
            self._begun = True
            if start.startswith(_WHOLE):
                self._holding = True
                return ""
        return self._before_a_call()

    def rest(self) -> str:
        """Return what was held back, for an answer that turned out to be text."""
        held, self._held = self._held, ""
        return held

    def _before_a_call(self) -> str:
        place = self._held.find(_OPEN)
        self._holding = place >= 0
        if place < 0:
            place = len(self._held) - _overlap(self._held, _OPEN)
        shown, self._held = self._held[:place], self._held[place:]
        return shown


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)


def text_beside_calls(text: str) -> str | None:
    """Return what an answer with calls says before them, None for nothing."""
    before, mark, _ = text.partition(_OPEN)
    return (before.strip() or None) if mark else None
