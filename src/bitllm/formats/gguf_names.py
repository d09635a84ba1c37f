"""GGUF files by their names: which there are, of which kind, in how many parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

__all__ = ["gguf_names", "gguf_parts", "is_of_kind"]

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MOST_PARTS = 1000


def gguf_names(names: Sequence[str]) -> list[str]:
    """Return the GGUF files, of split ones the first part."""
    matches = {name: _SPLIT.fullmatch(name) for name in names if name.endswith(".gguf")}
    return sorted(name for name, split in matches.items() if not split or int(split[2]) == 1)


def is_of_kind(name: str, kind: str) -> bool:
    """Whether the name holds `kind` as a whole word, in any case: "x-i2_s.gguf" is of "I2_S"."""
    stem = PurePosixPath(name).stem.lower()
    return re.search(rf"(?<![a-z0-9]){re.escape(kind.lower())}(?![a-z0-9_])", stem) is not None


def gguf_parts(file: str) -> list[str]:
    """Return all parts of a split GGUF file, or the file alone."""
    split = _SPLIT.fullmatch(file)
    if split is None or not 0 < int(split[3]) <= _MOST_PARTS:
        return [file]
    return [f"{split[1]}-{part:05d}-of-{split[3]}.gguf" for part in range(1, int(split[3]) + 1)]
