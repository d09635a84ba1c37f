"""Where in a text its last tokens stood before, and how often what followed then follows again."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

__all__ = ["LONGEST_MATCH", "NgramIndex", "first_rates"]

LONG, SHORT = 4, 2
"""Lengths of the n-grams whose last place is known. What follows a longer one is likelier."""

LONGEST_MATCH = 31
"""Tokens of agreement before a place that are told apart from fewer."""

_MOST_SLOTS = 1 << 16
_LEARNING = 1 / 16  # weight of the last token in the rates of a text

_FIRST_RATES = (0.1, 0.3, 0.5, 0.7, 0.85)
"""How likely a foretold token is by the bits of the length of the agreement, before any is seen."""


def first_rates() -> list[float]:
    """Return the rates of texts of which nothing is known yet."""
    return list(_FIRST_RATES)


class NgramIndex:
    """Foretells the next tokens of one text from what followed its last tokens before.

    It follows one earlier place of the text for as long as the tokens agree, and looks for another
    one when they do not: the last place of the same four tokens, or of the same two. Tokens that
    are drawn are compared with what was foretold whether anybody asked or not, so how often it is
    right is known without computing anything.

    A token costs two look-ups in tables of fixed size, at most 512 KB together; a slot that two
    n-grams share leads to a place that does not agree, which is seen.

    Args:
        token_ids: the text, prompt and output; it is read again as it grows, never copied.
        drawn: the first tokens of it say nothing about how often this index is right.
        most_tokens: how long the text may become.
        rates: how often texts went as foretold; copied.
    """

    def __init__(
        self, token_ids: Sequence[int], drawn: int, most_tokens: int, rates: Sequence[float]
    ) -> None:
        self._tokens = token_ids
        self._drawn = drawn
        self._rates = list(rates)
        self._read = 0
        self._source = 0  # whose token is foretold, 0 = none
        self._agreed = 0
        slots = min(_MOST_SLOTS, 1 << max(6, most_tokens.bit_length()))
        self._mask = slots - 1
        self._long = array("i", bytes(4 * slots))  # the token after the n-gram of each slot
        self._short = array("i", bytes(4 * slots))

    def read(self) -> list[tuple[int, bool]]:
        """Take in what the text has grown by; return (bits of agreement, right) of its tokens."""
        learnt: list[tuple[int, bool]] = []
        for at in range(self._read, len(self._tokens)):
            if self._source and at >= self._drawn:
                kind, right = self._kind(0), self._tokens[self._source] == self._tokens[at]
                self._rates[kind] += _LEARNING * (right - self._rates[kind])
                learnt.append((kind, right))
            self._read = at + 1  # first: a token that an interrupt cuts short is not taken twice
            self._take(at)
        return learnt

    def chances(self, most: int, least: float) -> list[float]:
        """Return how likely the next 1, 2, ... tokens come as foretold, at most `most` of them.

        Args:
            most: how many are wanted.
            least: the list ends before one that is no likelier than this.
        """
        chances: list[float] = []
        chance = 1.0 if self._source else 0.0
        for ahead in range(most):
            chance *= self._rates[self._kind(ahead)]
            if chance <= least:
                break
            chances.append(chance)
        return chances

    def foretell(self, count: int) -> tuple[int, ...]:
        """Return the next tokens; a place near the end repeats what is between it and the end."""
        if not self._source:
            return ()
        follow = tuple(self._tokens[self._source : self._source + count])
        while len(follow) < count:
            follow += follow[: count - len(follow)]
        return follow

    def _kind(self, ahead: int) -> int:
        return min(self._agreed + ahead, LONGEST_MATCH).bit_length() - 1

    def _take(self, at: int) -> None:
        tokens, end = self._tokens, at + 1
        long = self._replace(self._long, LONG, end)
        short = self._replace(self._short, SHORT, end)
        if self._source and tokens[self._source] == tokens[at]:
            self._source += 1
            self._agreed += 1
            return
        self._source = 0
        for place, least in ((long, LONG), (short, SHORT)):
            agreed = self._agreement(place, end) if place else 0
            if agreed >= least:
                self._source, self._agreed = place, agreed
                return

    def _replace(self, table: array[int], length: int, end: int) -> int:
        """Note where an n-gram ends, and return where it did before, 0 = nowhere."""
        if end < length:
            return 0
        slot = hash(tuple(self._tokens[end - length : end])) & self._mask
        before, table[slot] = table[slot], end
        return before

    def _agreement(self, place: int, end: int) -> int:
        """Return how many tokens before these two places are the same, at most `LONGEST_MATCH`."""
        tokens = self._tokens
        for length in range(min(place, LONGEST_MATCH)):
            if tokens[place - 1 - length] != tokens[end - 1 - length]:
                return length
        return min(place, LONGEST_MATCH)
