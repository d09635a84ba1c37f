"""config.json with typed access: every failure names the file and the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitllm.errors import FormatError

__all__ = ["ConfigFields"]

_MAX_WIDTH = 1 << 30


class ConfigFields:
    """The fields of config.json, or of an object in it.

    Args:
        path: the file, for messages.
        fields: its contents.
    """

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def get(self, key: str) -> Any:
        """Return the value of `key` as it is, None if it is not there."""
        return self.fields.get(key)

    def fail(self, key: str, wanted: str) -> FormatError:
        """Return the error that says what the value of `key` should have been."""
        return FormatError(
            f"{self.path}: {key} should be {wanted}, got {self.get(key)!r:.100}",
            hint="the file is damaged or was edited by mistake; fetch it again",
        )

    def size(self, key: str, default: int | None = None, most: int = _MAX_WIDTH) -> int:
        """Return a whole number from 1 to `most`; a key without default must be there.

        Raises:
            FormatError: the key is missing or holds something else.
        """
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise FormatError(
                f"{self.path}: {key} is missing", hint="the file is not a model's config.json"
            )
        if type(value) is not int or not 0 < value <= most:
            raise self.fail(key, f"a whole number from 1 to {most}")
        return value

    def positive(self, key: str, default: float) -> float:
        """Return a positive number below 1e300.

        Raises:
            FormatError: the key holds something else.
        """
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "a positive number")
        if not (value > 0 and value < 1e300 and math.isfinite(value)):
            raise self.fail(key, "a positive number")
        return float(value)

    def switch(self, key: str, default: bool = False) -> bool:
        """Return true or false.

        Raises:
            FormatError: the key holds something else.
        """
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def section(self, key: str) -> ConfigFields | None:
        """Return the object under `key`, or None.

        Raises:
            FormatError: the key holds something else.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return ConfigFields(self.path, value)

    def text(self, key: str, default: str) -> str:
        """Return a string.

        Raises:
            FormatError: the key holds something else.
        """
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value
