"""What a request wants of the tokens it gives: their scores, all logits, or hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import OutputKind
from bitllm.checkpoint import ModelSpec
from bitllm.engine.outputs import TokenLogprob
from bitllm.errors import InsufficientMemoryError

__all__ = ["Readout", "Rows", "longest_run"]

F32 = npt.NDArray[np.float32]

_STEP_VALUES = 2**22  # of logits that one step brings out for a sequence: 16 MB


@dataclass(frozen=True, slots=True)
class Readout:
    """Outputs of consecutive rows of a prompt; each row sees the tokens up to its own.

    Attributes:
        kind: `OutputKind` HIDDEN, LOGITS or SCORE.
        start: the first row.
        count: how many rows.
        targets: for SCORE, the id to score in each row; empty for the others.
        top_n: for SCORE, how many of the likeliest ids are told.
    """

    kind: Literal[0, 1, 2]
    start: int
    count: int
    targets: tuple[int, ...] = ()
    top_n: int = 0


class Rows:
    """The rows of a `Readout`, filled in as steps compute them.

    Attributes:
        readout: as given.
        done: rows filled so far.
        values: float32 [count, hidden] or [count, vocab]; for SCORE the log-probabilities [count].
        top_ids: for SCORE int32 [count, top_n], most likely first.
        top_logprobs: for SCORE float32 [count, top_n].

    Raises:
        InsufficientMemoryError: they do not fit into memory.
    """

    def __init__(self, readout: Readout, spec: ModelSpec) -> None:
        self.readout = readout
        self.done = 0
        widths = {OutputKind.HIDDEN: (spec.hidden_size,), OutputKind.LOGITS: (spec.vocab_size,)}
        shape = (readout.count, *widths.get(readout.kind, ()))
        try:
            self.values: F32 = np.empty(shape, np.float32)
        except MemoryError as error:
            raise InsufficientMemoryError(
                f"{readout.count} rows of float32 {list(shape[1:])} do not fit into memory",
                hint="ask for fewer tokens at a time",
            ) from error
        self.top_ids = np.full((readout.count, readout.top_n), -1, np.int32)
        self.top_logprobs = np.full((readout.count, readout.top_n), np.nan, np.float32)

    @property
    def complete(self) -> bool:
        """Whether every row is filled."""
        return self.done == self.readout.count

    def wanted(self, start: int, end: int) -> range:
        """Return the positions from `start` to before `end` whose rows are still to be filled."""
        first = self.readout.start + self.done
        last = self.readout.start + self.readout.count
        return range(max(start, first), max(start, first, min(end, last)))

    def take(
        self,
        values: F32,
        top_ids: npt.NDArray[np.int32] | None = None,
        top_logprobs: F32 | None = None,
    ) -> None:
        """Fill the next rows; the last two arrays may be wider than `top_n`."""
        rows = slice(self.done, self.done + len(values))
        self.values[rows] = values
        if top_ids is not None and top_logprobs is not None:
            self.top_ids[rows] = top_ids[:, : self.readout.top_n]
            self.top_logprobs[rows] = top_logprobs[:, : self.readout.top_n]
        self.done = rows.stop

    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Return the scores of the SCORE rows that are filled, one for each target."""
        rows = zip(
            self.readout.targets[: self.done],
            self.values[: self.done].astype(np.float64).tolist(),
            self.top_ids[: self.done].tolist(),
            self.top_logprobs[: self.done].astype(np.float64).tolist(),
            strict=True,
        )
        return tuple(
            TokenLogprob(target, value, tuple(zip(ids, logprobs, strict=True)))
            for target, value, ids, logprobs in rows
        )


def longest_run(rows: Rows | None, budget: int) -> int:
    """Return how many tokens of a sequence a step may compute, at most `budget`.

    Logits of a large vocabulary come out a few rows at a time.
    """
    if rows is None or rows.readout.kind != OutputKind.LOGITS:
        return budget
    vocab: int = rows.values.shape[1]
    return min(budget, max(1, _STEP_VALUES // vocab))
