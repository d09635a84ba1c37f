"""What lies beside the weights: configuration, tokenizer, generation defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitllm.errors import CheckpointError
from bitllm.formats.json_file import read_json_object
from bitllm.formats.writers.planned import PlannedFile

__all__ = ["CONFIG_FILE", "ModelTexts", "read_texts"]

CONFIG_FILE = "config.json"
_CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_MAX_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class ModelTexts:
    """The text files of a model.

    Attributes:
        config: the fields of config.json, None where the source has none of the kind that
            transformers reads.
        config_bytes: config.json as it stands.
        files: the other files, by name, with what is in them.
        token_ids: bos_token_id, eos_token_id and pad_token_id, for a config.json to be made.
    """

    config: Mapping[str, Any] | None = None
    config_bytes: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    token_ids: Mapping[str, Any] = field(default_factory=dict)

    def planned(self) -> list[PlannedFile]:
        """Return the files but for config.json."""
        return [PlannedFile.of(name, content) for name, content in self.files.items()]


def read_texts(directory: Path) -> ModelTexts:
    """Read the text files of a model's directory; of those known by name, licences included.

    Raises:
        CheckpointError: a file cannot be read, or is absurdly large.
        FormatError: config.json is no JSON object.
    """
    names = [name for name in _CARRIED if (directory / name).is_file()]
    names += sorted(path.name for path in directory.glob("LICENSE*") if path.is_file())
    files = {name: _read(directory / name) for name in names}
    config = directory / CONFIG_FILE
    if not config.is_file():
        return ModelTexts(files=files)
    fields = read_json_object(config)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return ModelTexts(
        fields, _read(config), files, {key: fields[key] for key in ids if key in fields}
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, so no text file")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
