"""What a conversion takes over from its source beside the weights: text files and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitllm.errors import TokenizerError
from bitllm.formats import read_generation_config
from bitllm.formats.json_file import read_json_object
from bitllm.formats.writers.gguf_file import Value
from bitllm.formats.writers.gguf_tokenizer import TokenizerFacts, tokenizer_metadata
from bitllm.formats.writers.texts import ModelTexts, read_texts
from bitllm.tokenizer import Tokenizer, load_tokenizer

__all__ = ["directory_texts", "gguf_tokenizer"]

_TOKENIZER = "tokenizer.json"


def directory_texts(path: Path) -> ModelTexts:
    """Return the text files that a model directory made of `path` gets.

    Raises:
        CheckpointError: one of its kinds: a file cannot be read.
    """
    return read_texts(path)


def gguf_tokenizer(path: Path, vocab_size: int) -> tuple[dict[str, Value] | None, tuple[str, ...]]:
    """Return the metadata of the tokenizer for a GGUF file, and what should be known of it.

    Args:
        path: the source.
        vocab_size: rows of the embedding.

    Raises:
        TokenizerError: the tokenizer is broken, or GGUF has no metadata for its kind.
    """
    file = path / _TOKENIZER
    if not file.is_file():
        return None, (f"{path} has no {_TOKENIZER}, so the file will hold no tokenizer.",)
    tokenizer = load_tokenizer(path)
    facts = _facts(path, tokenizer)
    try:
        return tokenizer_metadata(file.read_bytes(), facts, vocab_size)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error.message}", hint=error.hint) from error


def _facts(path: Path, tokenizer: Tokenizer) -> TokenizerFacts:
    """Gather the special ids; the end is what config.json or generation_config.json says first."""
    config: dict[str, Any] = {}
    if (path / "config.json").is_file():
        config = read_json_object(path / "config.json")
    ends = [*_ids(config.get("eos_token_id")), *read_generation_config(path).eos_token_ids]
    ends += sorted(tokenizer.stop_ids)
    eos = next((end for end in ends if end in tokenizer.stop_ids), None)
    # Where a chat's turns end is what a program must not miss.
    others = sorted(tokenizer.stop_ids - {eos})
    template = tokenizer.chat_template or ""
    written = [end for end in others if (tokenizer.token(end) or "\0") in template]
    pad = next(iter(_ids(config.get("pad_token_id"))), None)
    return TokenizerFacts(
        bos_id=tokenizer.bos_id,
        eos_id=eos,
        turn_end_id=next(iter([*written, *others]), None),
        pad_id=pad,
        adds_bos=tokenizer.encode("")[:1] == [tokenizer.bos_id],
        chat_template=tokenizer.chat_template,
    )


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if type(entry) is int and entry >= 0]
