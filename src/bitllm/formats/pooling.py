"""Which hidden states of a text are its embedding: what sentence-transformers writes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bitllm.errors import UnsupportedModelError
from bitllm.formats.json_file import read_json_object

__all__ = ["read_pooling"]

_FILE = "1_Pooling/config.json"
_PREFIX = "pooling_mode_"
_LAST = "lasttoken"


def read_pooling(directory: Path, architecture: str) -> Literal["none", "last"]:
    """Return how a text's embedding is made of its hidden states.

    Models whose architecture has no head embed texts; where they say nothing, by the hidden state
    of the last token, since in a decoder only that one has seen the whole text.

    Args:
        directory: of the model.
        architecture: its name in config.json.

    Raises:
        UnsupportedModelError: another kind of pooling, or layers behind it.
        FormatError: 1_Pooling/config.json is broken.
    """
    for path in sorted(directory.glob("*_Dense")):
        raise UnsupportedModelError(
            f"{path}: a layer behind the pooling, which is not computed",
            hint="embeddings are the hidden state of the last token, of length 1",
        )
    file = directory / _FILE
    if not file.is_file():
        return "none" if architecture.endswith("ForCausalLM") else "last"
    modes = _modes(read_json_object(file))
    if modes != [_LAST]:
        raise UnsupportedModelError(
            f"{file}: pooling by {' and '.join(modes) or 'nothing'} is not supported",
            hint=f"supported is {_PREFIX}{_LAST}",
        )
    return "last"


def _modes(fields: dict[str, object]) -> list[str]:
    """The modes that are on: a switch for each, or in newer files one name."""
    named = fields.get("pooling_mode")
    if isinstance(named, str):
        return [named[:40]]
    return [
        key.removeprefix(_PREFIX)[:40]
        for key, value in fields.items()
        if key.startswith(_PREFIX) and value is True
    ]
