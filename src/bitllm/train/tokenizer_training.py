"""A byte-level BPE tokenizer, learned from documents, with the tokens of a dialogue."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bitllm.errors import ConfigError
from bitllm.train.documents import Document

__all__ = [
    "BEGIN",
    "CHAT_TEMPLATE",
    "END",
    "END_OF_TURN",
    "SPECIAL_TOKENS",
    "DocumentEncoder",
    "tokenizer_config",
    "train_tokenizer",
]

BEGIN, END, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|end_of_turn|>"
_ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (BEGIN, END, END_OF_TURN, *_ROLES.values())
"""Ids 0, 1, 2, ... in this order."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}{{ message['content'] | trim }}"
    "{{ '" + END_OF_TURN + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""How a dialogue is written: `DocumentEncoder` writes training text the same way."""


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary; the same documents in the same order give the same tokenizer.

    Args:
        documents: the text to learn from.
        vocab_size: entries wanted, special tokens and the 256 bytes included.

    Raises:
        ConfigError: the vocabulary is too small for bytes and special tokens, or larger than the
            text can fill.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(f"tokenizer.vocab_size must be at least {smallest}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (turn.text for document in documents for turn in document.turns)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"the text fills a vocabulary of {tokenizer.get_vocab_size()}, not of {vocab_size}",
            hint="lower tokenizer.vocab_size or add text",
        )
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[begin]
    )
    return tokenizer


def tokenizer_config(context: int) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json for a tokenizer trained here."""
    return {
        "add_bos_token": True,
        "bos_token": BEGIN,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


class DocumentEncoder:
    """Turns documents into token ids, dialogues as `CHAT_TEMPLATE` writes them.

    Args:
        path: a tokenizer.json that has `SPECIAL_TOKENS`.

    Raises:
        ConfigError: it cannot be read, or lacks a special token.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise ConfigError(f"{path}: cannot read this tokenizer: {error}") from error
        vocabulary = self._tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ConfigError(f"{path}: the tokenizer has no token {missing[0]}")
        self._ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.begin_id: int = self._ids[BEGIN]

    def encode(self, document: Document) -> list[int]:
        """Return begin, the turns, and end of text."""
        ids = [self.begin_id]
        for turn in document.turns:
            text = turn.text if turn.role is None else turn.text.strip()
            encoded = self._tokenizer.encode(text, add_special_tokens=False).ids
            if turn.role is not None:
                encoded = [self._ids[_ROLES[turn.role]], *encoded, self._ids[END_OF_TURN]]
            ids += encoded
        return [*ids, self._ids[END]]
