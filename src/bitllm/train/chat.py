"""Dialogues to learn from: JSONL files, the model's own chat template, and packed windows.

A line is {"messages": [{"role": ..., "content": ...}, ...]}. What the assistant says, with what
ends its turn, is learned; the rest is only read. A dialogue becomes tokens piece by piece, cut
where the prompt of an answer ends, since that is where generation will cut it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm.errors import BitllmError, ConfigError
from bitllm.tokenizer import Tokenizer
from bitllm.train.data import TrainingBatch
from bitllm.train.records import read_lines

__all__ = ["Dialogue", "PackedDialogues", "encode_dialogue", "read_dialogues"]

_OPEN_WINDOWS = 64
_ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Tokens of a dialogue.

    Attributes:
        name: file and line.
        ids: int64 [n].
        trained: which of them are learned, bool [n].
        answer_bytes: UTF-8 bytes of what the assistant says.
    """

    name: str
    ids: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]
    answer_bytes: int


def read_dialogues(paths: Sequence[Path], tokenizer: Tokenizer, longest: int) -> list[Dialogue]:
    """Read JSONL files; dialogues are cut to `longest` tokens, and left out if no answer is left.

    Raises:
        ConfigError: a file cannot be read, a line is no dialogue, or nothing is left; names the
            line.
    """
    dialogues = []
    for path in paths:
        for name, messages in _lines(path):
            try:
                dialogue = encode_dialogue(name, messages, tokenizer)
            except BitllmError as error:
                raise ConfigError(f"{name}: {error.message}", hint=error.hint) from error
            kept = dialogue.trained[:longest]
            if kept.any():
                part = kept.sum() / dialogue.trained.sum()
                size = round(dialogue.answer_bytes * float(part))
                dialogues.append(Dialogue(name, dialogue.ids[:longest], kept, size))
    if not dialogues:
        raise ConfigError(
            f"{', '.join(map(str, paths))}: no dialogue with an answer within {longest} tokens",
            hint="raise training.sequence_length, or look at the files",
        )
    return dialogues


def _lines(path: Path) -> Iterator[tuple[str, list[Message]]]:
    for name, line in read_lines(path):
        yield name, _messages(name, line)


def _messages(name: str, line: bytes) -> list[Message]:
    hint = 'a line is {"messages": [{"role": "user", "content": "..."}, ...]}'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid JSON: {error}", hint=hint) from error
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{name}: no list of messages", hint=hint)
    for message in messages:
        fine = (
            isinstance(message, dict)
            and message.get("role") in _ROLES
            and isinstance(message.get("content"), str)
        )
        if not fine:
            raise ConfigError(f"{name}: no message of a dialogue: {message!r:.100}", hint=hint)
    return messages


def encode_dialogue(name: str, messages: Sequence[Message], tokenizer: Tokenizer) -> Dialogue:
    """Turn messages into tokens by the chat template of a model.

    Raises:
        ConfigError: the dialogue begins with the assistant or never gets to it, or the template
            rewrites what was said before.
        ChatTemplateError: there is no template, or it fails on these messages.
        TokenizerError: a message is no valid Unicode string.
    """
    ids: list[int] = []
    trained: list[bool] = []
    text, size = "", 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise ConfigError("the dialogue begins with the assistant")
        prompt = tokenizer.apply_chat_template(messages[:index], True)
        whole = tokenizer.apply_chat_template(messages[: index + 1], False)
        if not (prompt.startswith(text) and whole.startswith(prompt)):
            raise ConfigError(
                f"the chat template rewrites earlier text when message {index} is added",
                hint="split the dialogue into one line for each answer",
            )
        if index and not ids:
            asked = tokenizer.encode_chat(messages[:index], True)
        else:
            asked = tokenizer.encode(prompt[len(text) :], add_bos=False)
        answer = tokenizer.encode(whole[len(prompt) :], add_bos=False)
        ids += asked + answer
        trained += [False] * len(asked) + [True] * len(answer)
        text, size = whole, size + len(message["content"].encode())
    if not ids:
        raise ConfigError("the assistant says nothing in this dialogue")
    return Dialogue(name, np.array(ids, np.int64), np.array(trained), size)


class PackedDialogues:
    """Windows of whole dialogues side by side, in an order that a seed fixes.

    Dialogues are put into windows once, each into the first of the last open ones that has room;
    every epoch goes through the windows in another order. What is left of a window is filled with
    tokens of a document of their own that are not learned.

    Args:
        dialogues: none longer than `length`.
        length: ids in a window.
        batch_size: windows in a batch.
        seed: fixes everything.
    """

    def __init__(
        self, dialogues: Sequence[Dialogue], length: int, batch_size: int, seed: int
    ) -> None:
        self._length, self._batch_size, self._seed = length, batch_size, seed
        order = np.random.default_rng([seed, 0]).permutation(len(dialogues))
        self.windows: list[list[Dialogue]] = []
        for index in order:
            self._put(dialogues[int(index)])
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def _put(self, dialogue: Dialogue) -> None:
        for window in self.windows[-_OPEN_WINDOWS:]:
            if sum(len(d.ids) for d in window) + len(dialogue.ids) <= self._length:
                window.append(dialogue)
                return
        self.windows.append([dialogue])

    def batch(self, index: int) -> TrainingBatch:
        """Return a batch; what it holds depends on seed and index alone."""
        first = index * self._batch_size
        rows = [self._row(*divmod(first + i, len(self.windows))) for i in range(self._batch_size)]
        ids, documents, trained = (np.stack(part) for part in zip(*rows, strict=True))
        return TrainingBatch(ids, documents, trained)

    def _row(self, epoch: int, place: int) -> tuple[Any, Any, Any]:
        if epoch != self._epoch:
            random = np.random.default_rng([self._seed, 1, epoch])
            self._order, self._epoch = random.permutation(len(self.windows)), epoch
        ids = np.zeros(self._length, np.int64)
        documents = np.full(self._length, -1, np.int32)
        trained = np.zeros(self._length, np.bool_)
        start = 0
        for number, dialogue in enumerate(self.windows[self._order[place]]):
            end = start + len(dialogue.ids)
            ids[start:end], trained[start:end] = dialogue.ids, dialogue.trained
            trained[start] = False  # predicted by the dialogue before, which knows nothing of it
            documents[start:end] = number
            start = end
        return ids, documents, trained
