"""Documents: the text a model learns, before it is tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitllm.errors import ConfigError

__all__ = ["Document", "Turn", "documents_sha256", "file_documents", "is_held_out"]

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """A stretch of text: said by a role of a dialogue, or plain where `role` is None."""

    role: Role | None
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """Text that belongs together.

    Attributes:
        name: where it comes from; unique within a corpus.
        group: what is held out together, such as a module or a file.
        turns: one plain turn, or the turns of a dialogue.
    """

    name: str
    group: str
    turns: tuple[Turn, ...]

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of the text, without what marks the turns."""
        return sum(len(turn.text.encode()) for turn in self.turns)


def file_documents(paths: Sequence[Path]) -> list[Document]:
    """Read UTF-8 text files, one document and one group each, in the order of their names.

    Raises:
        ConfigError: no file is named, or one cannot be read as UTF-8 text.
    """
    if not paths:
        raise ConfigError("text.files names no file", hint="paths are relative to the recipe")
    documents = []
    for path in sorted(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot read this as UTF-8 text: {error}") from error
        documents.append(Document(path.name, path.name, (Turn(None, text),)))
    return documents


def documents_sha256(documents: Iterable[Document]) -> str:
    """Return the SHA-256 that pins a corpus: names, groups, roles and text, in order."""
    digest = hashlib.sha256()
    for document in documents:
        fields = [document.name, document.group]
        for turn in document.turns:
            fields += [turn.role or "", turn.text]
        for field in fields:
            encoded = field.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def is_held_out(group: str, percent: float) -> bool:
    """Say whether a group belongs to the held-out split: by a hash of its name alone."""
    word = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "little")
    return word < percent / 100 * 2**64
