"""What a conversion takes over from its source beside the weights: text files and tokenizer.

A GGUF file has no text files; those of a model directory are made from its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitllm.engine.loading import open_tokenizer
from bitllm.errors import TokenizerError
from bitllm.formats import find_gguf, read_gguf_texts
from bitllm.formats.writers.gguf_file import Value
from bitllm.formats.writers.gguf_tokenizer import (
    EMBEDDED_TOKENIZER,
    TokenizerFacts,
    tokenizer_metadata,
)
from bitllm.formats.writers.texts import ModelTexts, read_texts
from bitllm.tokenizer import Tokenizer

__all__ = ["directory_texts", "gguf_tokenizer"]

_TOKENIZER = "tokenizer.json"


def directory_texts(path: Path) -> ModelTexts:
    """Return the text files that a model directory made of a model gets.

    Args:
        path: a model directory, or a GGUF file.

    Raises:
        CheckpointError: one of its kinds: a file cannot be read.
        TokenizerError: the GGUF file's tokenizer is broken.
    """
    file = find_gguf(path)
    if file is None:
        return read_texts(path)
    fields = read_gguf_texts(file)
    if not len(fields.get("tokenizer.ggml.tokens", ())):
        return ModelTexts()
    return _made_texts(open_tokenizer(path), fields)


def _made_texts(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> ModelTexts:
    """Make the files of a tokenizer from a GGUF file's metadata and the tokenizer they describe."""
    eos = fields.get("tokenizer.ggml.eos_token_id")
    facts = _facts(tokenizer, [eos] if eos in tokenizer.stop_ids else [])
    ends = [end for end in (facts.eos_id, facts.turn_end_id) if end is not None]
    stops = [*ends, *sorted(tokenizer.stop_ids - {*ends})]
    names = {"bos_token": facts.bos_id, "eos_token": next(iter(ends[::-1]), None)}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: tokenizer.token(id) for key, id in names.items() if id is not None},
        "add_bos_token": facts.adds_bos,
    }
    if facts.chat_template is not None:
        settings["chat_template"] = facts.chat_template
    embedded = fields.get(EMBEDDED_TOKENIZER)
    text = embedded if isinstance(embedded, str) else _with_start(tokenizer.to_json(), facts, names)
    ids = {"bos_token_id": facts.bos_id, "eos_token_id": facts.eos_id}
    return ModelTexts(
        files={
            _TOKENIZER: text.encode(),
            "tokenizer_config.json": _json(settings),
            "generation_config.json": _json({"bos_token_id": facts.bos_id, "eos_token_id": stops}),
        },
        token_ids={key: id for key, id in ids.items() if id is not None},
    )


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _with_start(text: str, facts: TokenizerFacts, names: Mapping[str, Any]) -> str:
    """Let tokenizer.json put the start token in front of a text, as programs expect of it."""
    bos = names["bos_token"]
    fields = json.loads(text)
    if not facts.adds_bos or fields.get("post_processor") is not None:
        return text
    name = next(token["content"] for token in fields["added_tokens"] if token["id"] == bos)
    start = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, start, second],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }
    return json.dumps(fields, ensure_ascii=False)


def gguf_tokenizer(path: Path, vocab_size: int) -> tuple[dict[str, Value] | None, tuple[str, ...]]:
    """Return the metadata of a model's tokenizer for a GGUF file, and what should be known of it.

    Args:
        path: the source: a model directory, or a GGUF file.
        vocab_size: rows of the embedding.

    Raises:
        TokenizerError: the tokenizer is broken, or GGUF has no metadata for its kind.
        CheckpointError: one of its kinds: a file cannot be read.
    """
    texts = directory_texts(path)
    source = texts.files.get(_TOKENIZER)
    if source is None:
        return None, (f"{path} has no tokenizer, so the file will hold none.",)
    tokenizer = open_tokenizer(path)
    facts = _facts(tokenizer, _ids(texts.token_ids.get("eos_token_id")))
    pad = next(iter(_ids(texts.token_ids.get("pad_token_id"))), None)
    try:
        return tokenizer_metadata(source, facts, vocab_size, pad)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error.message}", hint=error.hint) from error


def _facts(tokenizer: Tokenizer, ends: list[int]) -> TokenizerFacts:
    """Gather the special ids; `ends` are those that the model's configuration calls the end."""
    ends = [*ends, *sorted(tokenizer.stop_ids)]
    eos = next((end for end in ends if end in tokenizer.stop_ids), None)
    # Where a chat's turns end is what a program must not miss.
    others = sorted(tokenizer.stop_ids - {eos})
    template = tokenizer.chat_template or ""
    written = [end for end in others if (tokenizer.token(end) or "\0") in template]
    return TokenizerFacts(
        bos_id=tokenizer.bos_id,
        eos_id=eos,
        turn_end_id=next(iter([*written, *others]), None),
        adds_bos=tokenizer.bos_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_id],
        chat_template=tokenizer.chat_template,
    )


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if type(entry) is int and entry >= 0]
