"""Reading recipes: TOML against the annotations of the dataclasses in `bitllm.train.recipe`.

An unknown key is an error that names the nearest known one; a value of the wrong type or out of
range is an error that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from bitllm.errors import ConfigError
from bitllm.train.recipe import Recipe

__all__ = ["load_recipe", "recipe_from_dict"]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        ConfigError: no such file, no TOML, or a key or value that cannot be meant.
    """
    try:
        data = path.read_bytes()
        values = tomllib.loads(data.decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this recipe: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: this recipe is not valid TOML: {error}") from error
    try:
        recipe = recipe_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error
    digest = hashlib.sha256(data).hexdigest()
    return dataclasses.replace(recipe, folder=path.parent, sha256=digest)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """Build a recipe from the tables of a TOML file.

    Raises:
        ConfigError: a key or value that cannot be meant.
    """
    recipe: Recipe = _build(Recipe, values, "", hidden={"folder", "sha256"})
    return recipe


def _build(kind: Any, values: object, where: str, hidden: set[str] | None = None) -> Any:
    """Build the dataclass `kind` from a TOML table; `where` is the table's name and a dot."""
    table = where.rstrip(".")
    if not isinstance(values, dict):
        raise ConfigError(f"[{table}] must be a table, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in (hidden or ())}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown key {where}{key}", hint=hint)
    arguments = {}
    for name, item in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], where + name)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} is missing")
    return kind(**arguments)


def _convert(wanted: Any, value: object, key: str) -> Any:
    """Check a TOML value against an annotation and return it as that type."""
    if dataclasses.is_dataclass(wanted):
        return _build(wanted, value, f"{key}.")
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:  # only "X | None" occurs, and TOML has no null
        return _convert(options[0], value, key)
    if origin is Literal:
        if value not in options:
            known = ", ".join(map(repr, options))
            raise ConfigError(f"{key} must be one of {known}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list, got {value!r}")
        if options[-1] is not Ellipsis and len(value) != len(options):
            raise ConfigError(f"{key} must have {len(options)} entries, got {len(value)}")
        return tuple(_convert(options[0], entry, key) for entry in value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{key} must be of type {wanted.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {value}")
    return value
