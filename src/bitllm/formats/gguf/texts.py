"""What a GGUF file says about text: its tokenizer, chat template and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitllm.formats.gguf.shards import GgufModel

__all__ = ["read_gguf_texts"]


def read_gguf_texts(path: Path) -> dict[str, Any]:
    """Return the metadata `general.*` and `tokenizer.*`: strings as lists, numbers as arrays.

    Args:
        path: the file, or any of the files of a model that was split.

    Raises:
        CheckpointError: one of its kinds, for whatever is wrong with the file.
    """
    model = GgufModel(path)
    wanted = [key for key in model.metadata if key.startswith(("general.", "tokenizer."))]
    return {key: model.values(key) for key in wanted}
