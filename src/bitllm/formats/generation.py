"""generation_config.json: what a model's authors suggest for sampling."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitllm.errors import FormatError
from bitllm.formats.json_file import read_json_object

__all__ = ["GenerationDefaults", "read_generation_config"]

_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Suggested settings; None where the file says nothing.

    `do_sample` False means greedy decoding, whatever the temperature says.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def read_generation_config(path: Path) -> GenerationDefaults:
    """Read generation_config.json of a model directory; all None if there is no such file.

    Args:
        path: the model's directory, or its GGUF file, beside which the file may lie.

    Raises:
        FormatError: a value of another type than its key allows.
    """
    directory = Path(path)
    file = (directory.parent if directory.is_file() else directory) / _FILE
    if not file.is_file():
        return GenerationDefaults()
    fields = read_json_object(file)
    return GenerationDefaults(
        do_sample=_boolean(file, fields, "do_sample"),
        temperature=_number(file, fields, "temperature"),
        top_k=_integer(file, fields, "top_k"),
        top_p=_number(file, fields, "top_p"),
        min_p=_number(file, fields, "min_p"),
        typical_p=_number(file, fields, "typical_p"),
        repetition_penalty=_number(file, fields, "repetition_penalty"),
        max_new_tokens=_integer(file, fields, "max_new_tokens"),
        bos_token_id=_integer(file, fields, "bos_token_id"),
        eos_token_ids=_integers(file, fields, "eos_token_id"),
    )


def _boolean(file: Path, fields: dict[str, Any], key: str) -> bool | None:
    value = fields.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise FormatError(f"{file}: {key} should be true or false, got {value!r}")


def _number(file: Path, fields: dict[str, Any], key: str) -> float | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # a whole number of hundreds of digits
            if math.isfinite(value):
                return float(value)
    raise FormatError(f"{file}: {key} should be a number, got {value!r:.100}")


def _integer(file: Path, fields: dict[str, Any], key: str) -> int | None:
    value = fields.get(key)
    if value is None or type(value) is int:
        return value
    raise FormatError(f"{file}: {key} should be a whole number, got {value!r}")


def _integers(file: Path, fields: dict[str, Any], key: str) -> tuple[int, ...]:
    value = fields.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(entry) is int for entry in values):
        raise FormatError(f"{file}: {key} should be one token id or a list of them, got {value!r}")
    return tuple(values)
