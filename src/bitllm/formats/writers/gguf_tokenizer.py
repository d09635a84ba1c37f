"""A tokenizer as the metadata of a GGUF file: tokens, their types, merges or scores, special ids.

The metadata serves programs that know no tokenizer.json. The file itself is put in beside it, under
the key that the format keeps for it, so that nothing is lost for those that do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitllm.errors import TokenizerError
from bitllm.formats.writers.gguf_file import Value

__all__ = ["EMBEDDED_TOKENIZER", "PRE_TOKENIZERS", "TokenizerFacts", "tokenizer_metadata"]

EMBEDDED_TOKENIZER = "tokenizer.huggingface.json"
"""Key under which the whole of tokenizer.json stands in the file."""

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PRE_TOKENIZERS: Mapping[str, str] = {
    rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_ENDINGS}|{_LETTERS}|\p{{N}}|{_REST}": "qwen2",
}
"""The name in a GGUF file of a pre-tokenizer that splits by this regular expression."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What stands beside tokenizer.json.

    Attributes:
        bos_id: token that begins a text, or None.
        eos_id: token that ends one, or None.
        turn_end_id: token that ends a turn of a chat, where that is another one.
        adds_bos: whether a plain text begins with `bos_id`.
        chat_template: its source, or None.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    turn_end_id: int | None = None
    adds_bos: bool = False
    chat_template: str | None = None


def tokenizer_metadata(
    source: bytes, facts: TokenizerFacts, vocab_size: int, pad_id: int | None = None
) -> tuple[dict[str, Value], tuple[str, ...]]:
    """Return the metadata and what should be known of it.

    Args:
        source: tokenizer.json.
        facts: what stands beside it.
        vocab_size: rows of the embedding; ids without a token get an unused one.
        pad_id: token that fills up, or None.

    Raises:
        TokenizerError: the file is no tokenizer, has more tokens than the model, or is of a kind
            for which GGUF has no metadata.
    """
    fields = _parse(source)
    model = fields.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise TokenizerError(
            f"tokenizer.json: no metadata of GGUF files stands for a tokenizer of type {kind!r}",
            hint="byte-level BPE, and BPE with bytes to fall back on, can be written",
        )
    tokens, types = _tokens(fields, model, vocab_size)
    metadata: dict[str, Value]
    notes: tuple[str, ...] = ()
    merges = [_merge(pair) for pair in model.get("merges", ())]
    if model.get("byte_fallback"):
        metadata = _sentencepiece(fields, tokens, merges)
    else:
        pre, notes = _pre_tokenizer(fields)
        metadata = {
            "tokenizer.ggml.model": ("str", "gpt2"),
            "tokenizer.ggml.pre": ("str", pre),
            "tokenizer.ggml.merges": ("[str]", [" ".join(pair) for pair in merges]),
        }
    metadata["tokenizer.ggml.tokens"] = ("[str]", tokens)
    metadata["tokenizer.ggml.token_type"] = ("[i32]", types)
    metadata |= _special(facts, pad_id)
    metadata[EMBEDDED_TOKENIZER] = ("str", source.decode("utf-8-sig"))
    return metadata, notes


def _parse(source: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(source.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"tokenizer.json: not readable as JSON ({error})", hint="download it again"
        ) from error
    if not isinstance(fields, dict):
        raise TokenizerError("tokenizer.json: should hold a JSON object")
    return fields


def _tokens(
    fields: Mapping[str, Any], model: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Return text and type of every id below `vocab_size`."""
    known: dict[int, tuple[str, int]] = {}
    for text, index in model["vocab"].items():
        byte = bool(model.get("byte_fallback")) and _is_byte(text)
        kind = _BYTE if byte else _UNKNOWN if text == model.get("unk_token") else _NORMAL
        known[index] = (text, kind)
    for added in fields.get("added_tokens", ()):
        index, unknown = added["id"], added["content"] == model.get("unk_token")
        kind = _UNKNOWN if unknown else _CONTROL if added.get("special") else _USER_DEFINED
        known[index] = (added["content"], kind)
    largest = max(known, default=-1)
    if largest >= vocab_size:
        raise TokenizerError(
            f"tokenizer.json: the token {known[largest][0]!r:.60} has the id {largest}, the model "
            f"has {vocab_size} tokens",
            hint="the tokenizer belongs to another model",
        )
    rows = [known.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(vocab_size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _merge(pair: Any) -> tuple[str, str]:
    """Two tokens to be joined: a list of two, or in older files one string with a space."""
    first, second = pair if isinstance(pair, list) else str(pair).split(" ", 1)
    return str(first), str(second)


def _sentencepiece(
    fields: Mapping[str, Any], tokens: list[str], merges: list[tuple[str, str]]
) -> dict[str, Value]:
    """Turn the order of merges into scores: what is merged first has the highest one."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    prefix = '"Prepend"' in json.dumps(fields.get("normalizer")) or (
        '"first"' in json.dumps(fields.get("pre_tokenizer"))
    )
    return {
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.pre": ("str", "default"),
        "tokenizer.ggml.scores": ("[f32]", [-ranks.get(text, len(merges)) for text in tokens]),
        "tokenizer.ggml.add_space_prefix": ("bool", prefix),
    }


def _pre_tokenizer(fields: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the name for the way in which text is split before merges, and a note if none fits."""
    found = fields.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2", ()
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        name = PRE_TOKENIZERS.get(parts[0].get("pattern", {}).get("Regex"))
        if name is not None:
            return name, ()
    note = (
        "GGUF has no name for the way in which this tokenizer splits text, so programs that do not "
        f"read {EMBEDDED_TOKENIZER} may split it in another way."
    )
    return "default", (note,)


def _special(facts: TokenizerFacts, pad_id: int | None) -> dict[str, Value]:
    ids = {
        "bos": facts.bos_id,
        "eos": facts.eos_id,
        "eot": facts.turn_end_id,
        "padding": pad_id,
    }
    special: dict[str, Value] = {
        f"tokenizer.ggml.{name}_token_id": ("u32", index)
        for name, index in ids.items()
        if index is not None
    }
    special["tokenizer.ggml.add_bos_token"] = ("bool", facts.adds_bos)
    if facts.chat_template is not None:
        special["tokenizer.chat_template"] = ("str", facts.chat_template)
    return special
