"""GGUF files by their names: which there are, of which kind, in how many parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

__all__ = ["MOST_PARTS", "gguf_names", "gguf_parts", "is_of_kind", "split_number"]

MOST_PARTS = 4096
"""Files of one model at most."""

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def gguf_names(names: Sequence[str]) -> list[str]:
    """Return the GGUF files, of split ones the first part."""
    split = {name: split_number(name) for name in names if name.endswith(".gguf")}
    return sorted(name for name, part in split.items() if part is None or part[0] == 1)


def split_number(file: str) -> tuple[int, int] | None:
    """Return which part a file of a split model is and how many there are; None of others."""
    match = _SPLIT.fullmatch(file)
    return None if match is None else (int(match[2]), int(match[3]))


def is_of_kind(name: str, kind: str) -> bool:
    """Whether the name holds `kind` as a whole word, in any case: "x-i2_s.gguf" is of "I2_S"."""
    stem = PurePosixPath(name).stem.lower()
    return re.search(rf"(?<![a-z0-9]){re.escape(kind.lower())}(?![a-z0-9_])", stem) is not None


def gguf_parts(file: str) -> list[str]:
    """Return all parts of a split GGUF file, or the file alone."""
    split = _SPLIT.fullmatch(file)
    if split is None or not 0 < int(split[3]) <= MOST_PARTS:
        return [file]
    return [f"{split[1]}-{part:05d}-of-{split[3]}.gguf" for part in range(1, int(split[3]) + 1)]
