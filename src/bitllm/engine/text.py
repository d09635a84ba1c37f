"""From token ids to text that may be shown: whole characters, and never part of a stop string."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Detokenizer", "TextStream"]


class Detokenizer(Protocol):
    """Turns ids into text one at a time; `bitllm.tokenizer.StreamDetokenizer` is one."""

    def push(self, token_id: int) -> str:
        """Add an id and return the characters it completes."""

    def flush(self) -> str:
        """Return what is left, incomplete characters replaced."""


class TextStream:
    """The text of one sequence, cut before the first stop string.

    The stop string that ends first counts (of two that end together, the longer one), so the text
    does not depend on how it falls into tokens.

    Args:
        detokenizer: source of the characters.
        stops: the stop strings, none of them empty.

    Attributes:
        taken: how many pieces of the text `take` has given out.
    """

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._held = ""
        self._released: list[str] = []
        self.taken = 0

    @property
    def text(self) -> str:
        """Everything released so far."""
        return "".join(self._released)

    def take(self) -> str:
        """Return what was released since the last call."""
        new = "".join(self._released[self.taken :])
        self.taken = len(self._released)
        return new

    def push(self, token_id: int, *, may_stop: bool) -> bool:
        """Add a token; return True if it completes a stop string.

        Args:
            token_id: the next id.
            may_stop: whether a stop string completed by this token counts; if not, it is text.
        """
        text = self._detokenizer.push(token_id)
        if not self._stops:
            self._release(text)
            return False
        self._held += text
        while (match := self._first_stop()) is not None:
            start, end = match
            if may_stop:
                self._release(self._held[:start])
                self._held = ""
                return True
            self._release(self._held[:end])
            self._held = self._held[end:]
        keep = self._possible_start()
        self._release(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def finish(self) -> None:
        """Release what is held back: no further token comes."""
        self._release(self._held + self._detokenizer.flush())
        self._held = ""

    def _release(self, text: str) -> None:
        if text:
            self._released.append(text)

    def _first_stop(self) -> tuple[int, int] | None:
        """Return (start, end) of the stop string that ends first in the held text."""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _possible_start(self) -> int:
        """Return the length of the longest end of the held text that may begin a stop string."""
        longest = min(len(self._held), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
