"""Which ids a text holds already, and how often they were generated: what penalties look at."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["SeenTokens"]

I32 = npt.NDArray[np.int32]

_ROOM = 64  # ids that the arrays hold at first, beyond those of the prompt


class SeenTokens:
    """The distinct ids of one text, in the order in which they came first.

    They are arrays that grow with the text, since a step that reads them is much shorter than
    making arrays of all ids anew would be.

    Args:
        prompt_ids: the text so far; these ids count as seen, but as generated 0 times.
    """

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.zeros(len(self._places) + _ROOM, np.int32)
        self._counts = np.zeros(len(self._ids), np.int32)
        self._ids[: len(self._places)] = list(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, token_id: int) -> None:
        """Count an id that was generated."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1

    def after(self, drafts: Iterable[int] = ()) -> SeenTokens:
        """Return what would be seen if these ids were generated next; nothing here changes."""
        drafted = SeenTokens(())
        drafted._places = dict(self._places)
        drafted._ids, drafted._counts = self._ids.copy(), self._counts.copy()
        for token_id in drafts:
            drafted.add(token_id)
        return drafted

    @property
    def ids(self) -> I32:
        """The ids, int32 [len]: a view, which later ids do not change."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> I32:
        """How often each was generated, int32 [len]: a view, which `add` changes."""
        return self._counts[: len(self._places)]
