"""Which packing of ternary weights is the faster one here: by a table, or as it was measured.

"auto" means what this machine's user has measured (`bitllm bench --tune`, kept in a small file of
the user's cache directory) for the same CPU, kernel set and threads and a model of about this size;
without that, what a fixed table says.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bitllm.config import PackingName

__all__ = [
    "PackingChoice",
    "Tuning",
    "choose_packing",
    "read_tunings",
    "store_tuning",
    "tuning_file",
]

Packing = Literal["2bit", "base3"]

_ALIKE = 4.0
"""Models up to so many times larger or smaller behave like the one that was measured."""

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class _Row:
    isa: str
    threads: int
    nbytes: int
    packing: Packing
    why: str


# Measured in mat-vecs from main memory and from the cache; the first row that fits decides. Base-3
# reads a fifth fewer bytes and takes more instructions to unpack: it pays where memory is what a
# kernel set waits for.
_TABLE = (
    _Row("avx512vnni", 1, 64 * _MIB, "base3", "reads fewer bytes, and memory is what limits"),
    _Row("", 1, 0, "2bit", "takes fewer instructions to unpack"),
)


@dataclass(frozen=True, slots=True)
class PackingChoice:
    """A packing and why it was chosen, in words that follow its name."""

    name: Packing
    reason: str


@dataclass(frozen=True, slots=True)
class Tuning:
    """What `bitllm bench --tune` measured once.

    Attributes:
        cpu: name of the CPU.
        isa: kernel set.
        threads: worker threads.
        ternary_bytes: bytes of the model's ternary weights at 2 bits.
        packing: the faster one.
        tokens_per_s: decoded tokens a second of each packing.
    """

    cpu: str
    isa: str
    threads: int
    ternary_bytes: int
    packing: Packing
    tokens_per_s: Mapping[str, float]


def choose_packing(
    asked: PackingName, *, cpu: str, isa: str, threads: int, ternary_bytes: int
) -> PackingChoice:
    """Return the packing that `asked` means, and why.

    Args:
        asked: "auto", "2bit" or "base3".
        cpu: name of the CPU, as `cpu_info` gives it.
        isa: kernel set.
        threads: worker threads.
        ternary_bytes: bytes of the model's ternary weights at 2 bits.
    """
    if asked != "auto":
        return PackingChoice(asked, "asked for")
    measured = [
        tuning
        for tuning in read_tunings()
        if (tuning.cpu, tuning.isa, tuning.threads) == (cpu, isa, threads)
        and _ratio(tuning.ternary_bytes, ternary_bytes) <= _ALIKE
    ]
    if measured:
        best = min(measured, key=lambda tuning: _ratio(tuning.ternary_bytes, ternary_bytes))
        speeds = ", ".join(f"{name} {speed:.4g}" for name, speed in best.tokens_per_s.items())
        return PackingChoice(best.packing, f"measured here by bitllm bench --tune, tok/s: {speeds}")
    row = next(
        row
        for row in _TABLE
        if row.isa in ("", isa) and row.threads <= threads and row.nbytes <= ternary_bytes
    )
    return PackingChoice(row.packing, f"by the table for {isa}: {row.why}")


def _ratio(first: int, second: int) -> float:
    low, high = sorted((max(first, 1), max(second, 1)))
    return high / low


def tuning_file() -> Path:
    """Return the file that measurements are kept in; it need not exist.

    Raises:
        OSError: the account has no home directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    # A relative path there is to be ignored: XDG Base Directory Specification.
    if cache and Path(cache).is_absolute():
        return Path(cache) / "bitllm" / "tuning.json"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return home / ".cache" / "bitllm" / "tuning.json"


def read_tunings() -> list[Tuning]:
    """Return what was measured on this account, [] if nothing; a damaged file is warned about."""
    try:
        path = tuning_file()
        content = path.read_bytes()
    except OSError:
        return []
    try:
        return [_tuning(entry) for entry in json.loads(content)["measured"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"{path} is damaged and not used ({error}); remove it", stacklevel=2)
        return []


def _tuning(entry: Any) -> Tuning:
    tuning = Tuning(**entry)
    if tuning.packing not in get_args(Packing):
        raise ValueError(f"unknown packing {tuning.packing!r}")
    numbers = (tuning.threads, tuning.ternary_bytes, *tuning.tokens_per_s.values())
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError("a number is expected")
    return tuning


def store_tuning(tuning: Tuning) -> Path:
    """Keep a measurement, in place of an earlier one of the same machine and size; return the file.

    Raises:
        OSError: the cache directory cannot be written.
    """
    path = tuning_file()
    kept = [old for old in read_tunings() if _key(old) != _key(tuning)]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"measured": [asdict(each) for each in (*kept, tuning)]}, indent=2)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)  # at once, for a process that reads it meanwhile
    return path


def _key(tuning: Tuning) -> tuple[str, str, int, int]:
    return (tuning.cpu, tuning.isa, tuning.threads, tuning.ternary_bytes)
