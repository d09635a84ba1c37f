"""What is unusual about a model: its weights, its tokenizer, its end of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bitllm.errors import CheckpointError

if TYPE_CHECKING:
    from bitllm.checkpoint import Checkpoint
    from bitllm.formats import ModelFiles
    from bitllm.tokenizer import Tokenizer

__all__ = ["find_oddities"]


def find_oddities(
    files: ModelFiles, checkpoint: Checkpoint, tokenizer: Tokenizer | None, *, thorough: bool
) -> list[str]:
    """Return what is unusual about a model, a sentence each.

    Args:
        files: where it is.
        checkpoint: what was opened there.
        tokenizer: the loaded tokenizer, None if it is broken.
        thorough: read all weights, not a sample of them.
    """
    from bitllm.formats.inspection import oddities

    found = oddities(checkpoint, thorough=thorough)
    if tokenizer is not None:
        found += _pre_tokenizer(files)
        found += _ends(files, checkpoint, tokenizer)
    return found


def _pre_tokenizer(files: ModelFiles) -> Iterator[str]:
    """BPE that nothing cuts into words merges across spaces, as no model was trained."""
    fields = _read(files, "tokenizer.json")
    model = fields.get("model")
    is_bpe = isinstance(model, dict) and model.get("type") == "BPE"
    if is_bpe and fields.get("pre_tokenizer") is None and fields.get("normalizer") is None:
        yield (
            "tokenizer.json has no pre-tokenizer: text may be cut into other tokens than in "
            "training"
        )


def _ends(files: ModelFiles, checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[str]:
    said: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = _read(files, name).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        said |= {entry for entry in values if type(entry) is int}
    stops = said | set(tokenizer.stop_ids)
    outside = sorted(end for end in stops if not 0 <= end < checkpoint.spec.vocab_size)
    if not stops:
        yield "no token ends a text: an answer goes on until it is as long as allowed"
    if outside:
        yield f"the end-of-text token {outside[0]} is not in the vocabulary"
    added = sorted(set(tokenizer.stop_ids) - said)
    if said and added:
        yield (
            f"config.json ends a text at {_listed(said)} only, the tokenizer or its chat template "
            f"at {_listed(added)} too; bitllm stops at each, other programs may not"
        )


def _listed(ids: Any) -> str:
    return ", ".join(map(str, sorted(ids)))


def _read(files: ModelFiles, name: str) -> dict[str, Any]:
    """Return a JSON file of the model; nothing if it is not there or broken."""
    from bitllm.formats.json_file import read_json_object

    try:
        return read_json_object(files.directory / name)
    except CheckpointError:
        return {}
