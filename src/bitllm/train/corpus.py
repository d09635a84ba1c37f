"""What a run learns from and is measured on: windows of text, or packed dialogues."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitllm.errors import ConfigError
from bitllm.tokenizer import Tokenizer, load_tokenizer
from bitllm.train.bits import held_out_pieces
from bitllm.train.chat import Dialogue, PackedDialogues, read_dialogues
from bitllm.train.data import ShuffledWindows, TokenShards, TrainingBatch
from bitllm.train.documents import Document, is_held_out
from bitllm.train.recipe import Recipe
from bitllm.train.start import find_model

__all__ = ["Corpus", "HeldOut", "ModelEncoder", "open_corpus", "open_held_out"]


class Batches(Protocol):
    """Batches by number."""

    def batch(self, index: int) -> TrainingBatch:
        """Return a batch; what it holds depends on seed and index alone."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Text that is not trained on.

    Attributes:
        pieces: token ids, int64 [n] each.
        counted: which of them count, bool [n] each; None = all but the first.
        text_bytes: UTF-8 bytes of the text that counts.
    """

    pieces: list[npt.NDArray[np.int64]]
    counted: list[npt.NDArray[np.bool_]] | None
    text_bytes: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """Both parts of a corpus."""

    batches: Batches
    held_out: HeldOut


def open_corpus(recipe: Recipe, shards: Path, vocab_size: int) -> Corpus:
    """Open the corpus of a recipe.

    Args:
        recipe: the run.
        shards: folder of token shards; not read for dialogues.
        vocab_size: of the model.

    Raises:
        ConfigError: the text is too short, damaged, or of another vocabulary.
        FormatError: the shards are damaged.
    """
    settings = recipe.training
    window = settings.sequence_length + 1
    if recipe.text.source == "chat":
        training, _ = _dialogues(recipe)
        packed = PackedDialogues(training, window, settings.batch_size, settings.seed)
        return Corpus(packed, open_held_out(recipe, shards))
    text = TokenShards.open(shards, "train")
    fits = text.vocab_size == vocab_size if recipe.start is None else text.vocab_size <= vocab_size
    if not fits:
        raise ConfigError(
            f"{shards}: the shards have {text.vocab_size} ids, the model has {vocab_size}",
            hint="they were made for another tokenizer; delete the folder and run again",
        )
    windows = ShuffledWindows(text, window, settings.batch_size, settings.seed)
    masked = _TextBatches(windows, text.begin_id if settings.document_mask else None)
    return Corpus(masked, open_held_out(recipe, shards))


def open_held_out(recipe: Recipe, shards: Path) -> HeldOut:
    """Open the held-out part of the corpus of a recipe; arguments and errors as `open_corpus`."""
    if recipe.text.source == "chat":
        _, held_out = _dialogues(recipe)
        size = sum(dialogue.answer_bytes for dialogue in held_out)
        return HeldOut([d.ids for d in held_out], [d.trained for d in held_out], size)
    text = TokenShards.open(shards, "held_out")
    pieces = held_out_pieces(text, recipe.training.sequence_length)
    return HeldOut(pieces, None, text.text_bytes)


@dataclass(frozen=True, slots=True)
class _TextBatches:
    """Windows of running text; `begin_id` starts documents that are not to see each other."""

    windows: ShuffledWindows
    begin_id: int | None

    def batch(self, index: int) -> TrainingBatch:
        ids = self.windows.batch(index)
        if self.begin_id is None:
            return TrainingBatch(ids)
        begins = ids == self.begin_id
        trained = ~begins  # nothing in the document before tells that another one begins
        return TrainingBatch(ids, np.cumsum(begins, axis=1), trained)


def _dialogues(recipe: Recipe) -> tuple[list[Dialogue], list[Dialogue]]:
    """Dialogues to train on, and those held out; by the hash of their place in the files."""
    assert recipe.start is not None  # recipes without one have no dialogues
    tokenizer = load_tokenizer(find_model(recipe.start.model, recipe.folder))
    paths = [recipe.folder / name for name in recipe.text.files]
    dialogues = read_dialogues(paths, tokenizer, recipe.training.sequence_length + 1)
    percent = recipe.text.held_out_percent
    held_out = [is_held_out(_group(dialogue, recipe.folder), percent) for dialogue in dialogues]
    training = [d for d, held in zip(dialogues, held_out, strict=True) if not held]
    if not training:
        raise ConfigError("all dialogues are held out", hint="lower text.held_out_percent")
    return training, [d for d, held in zip(dialogues, held_out, strict=True) if held]


def _group(dialogue: Dialogue, folder: Path) -> str:
    """File and line, without the folder that the recipe happens to lie in."""
    return dialogue.name.removeprefix(f"{folder}/")


class ModelEncoder:
    """Turns documents into ids with the tokenizer of an existing model.

    Args:
        tokenizer: of the model.

    Raises:
        ConfigError: it has no token that could begin a document.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self._end = min(tokenizer.stop_ids, default=None)
        begin = self._end if tokenizer.bos_id is None else tokenizer.bos_id
        if begin is None:
            raise ConfigError("the tokenizer of this model has no token that begins or ends a text")
        self.begin_id: int = begin

    def encode(self, document: Document) -> list[int]:
        """Return begin, the text, and the end where it is another token."""
        text = "\n".join(turn.text for turn in document.turns)
        ids = [i for i in self._tokenizer.encode(text, add_bos=False) if i != self.begin_id]
        end = [] if self._end is None or self._end == self.begin_id else [self._end]
        return [self.begin_id, *ids, *end]
