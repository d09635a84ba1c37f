"""Reading the JSON files beside a model's weights: tolerant of what real models contain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitllm.errors import CheckpointError, FormatError

__all__ = ["read_json_object"]

_MAX_BYTES = 64 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; of duplicate keys the last counts, as in published configurations.

    Raises:
        CheckpointError: the file cannot be opened.
        FormatError: it is no JSON object, or absurdly large.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if len(text) > _MAX_BYTES:
        raise FormatError(f"{path}: larger than {_MAX_BYTES >> 20} MiB")
    try:
        fields = json.loads(text.decode("utf-8-sig"))
        if b"\\ud" in text.lower():  # half of an escaped pair is no text that could be written
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(
            f"{path}: not valid JSON ({reason})", hint="the file is damaged; download it again"
        ) from error
    if not isinstance(fields, dict):
        raise FormatError(f"{path}: should hold a JSON object, holds a {type(fields).__name__}")
    return fields
