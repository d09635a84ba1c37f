"""Token shards: memory-mapped files of token ids, read in an order that a seed fixes.

A folder of shards holds `train-00000.bin`, `held_out-00000.bin`, ... (little-endian uint16, or
uint32 for vocabularies above 65,536) and `shards.json`, which names them with their hashes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitllm.errors import ConfigError, FormatError
from bitllm.train.documents import Document, is_held_out

__all__ = ["SPLITS", "Encoder", "ShuffledWindows", "TokenShards", "TrainingBatch", "write_shards"]

SPLITS = ("train", "held_out")
_INDEX = "shards.json"
_SHARD_TOKENS = 1 << 24

Ids = npt.NDArray[np.int64]


class Encoder(Protocol):
    """What turns documents into token ids; each begins with `begin_id`, which is nowhere else."""

    vocab_size: int
    begin_id: int

    def encode(self, document: Document) -> list[int]:
        """Return the ids of a document."""


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Windows of tokens, each predicting the next one.

    Attributes:
        ids: int64 [windows, length].
        documents: numbers of the documents that they belong to, int [windows, length]; tokens see
            those of their own only. None = a window is one document.
        trained: which tokens are learned, bool [windows, length]; None = all but the first.
    """

    ids: Ids
    documents: npt.NDArray[np.signedinteger[Any]] | None = None
    trained: npt.NDArray[np.bool_] | None = None

    @property
    def trained_tokens(self) -> int:
        """How many tokens are learned."""
        if self.trained is None:
            return self.ids[:, 1:].size
        return int(self.trained[:, 1:].sum())

    def rows(self, part: slice) -> TrainingBatch:
        """Return a part of the windows."""
        documents = None if self.documents is None else self.documents[part]
        trained = None if self.trained is None else self.trained[part]
        return TrainingBatch(self.ids[part], documents, trained)


class _ShardWriter:
    """Collects the ids of one split and writes a file whenever enough have come together."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype
        self._shard_tokens = shard_tokens
        self._pending = array("I")  # four bytes a token, where a list takes tens
        self.entries: list[dict[str, Any]] = []
        self.byte_count = 0

    def add(self, ids: list[int], byte_count: int) -> None:
        self._pending.extend(ids)
        self.byte_count += byte_count
        while len(self._pending) >= self._shard_tokens:
            self._write(self._pending[: self._shard_tokens])
            del self._pending[: self._shard_tokens]

    def finish(self) -> dict[str, Any]:
        if self._pending:
            self._write(self._pending)
        return {"shards": self.entries, "text_bytes": self.byte_count}

    def _write(self, ids: array[int]) -> None:
        name = f"{self._split}-{len(self.entries):05d}.bin"
        data = np.asarray(ids, self._dtype).tobytes()
        (self._folder / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        self.entries.append({"file": name, "tokens": len(ids), "sha256": digest})


def write_shards(
    documents: Iterable[Document],
    encoder: Encoder,
    folder: Path,
    *,
    held_out_percent: float,
    shard_tokens: int = _SHARD_TOKENS,
) -> None:
    """Tokenise documents into shards; a document goes to the split of its group.

    Args:
        documents: the corpus, in the order to keep.
        encoder: text to ids.
        folder: where the files go; made if need be, old shards are overwritten.
        held_out_percent: part of the groups to hold out, 0 to 100.
        shard_tokens: most tokens in one file.

    Raises:
        ConfigError: the files cannot be written.
    """
    try:
        _write_shards(documents, encoder, folder, held_out_percent, shard_tokens)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot write the token shards: {error.strerror or error}",
            hint="make room on the disk and run again",
        ) from error


def _write_shards(
    documents: Iterable[Document],
    encoder: Encoder,
    folder: Path,
    held_out_percent: float,
    shard_tokens: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)
    dtype = "<u2" if encoder.vocab_size <= 1 << 16 else "<u4"
    writers = {split: _ShardWriter(folder, split, dtype, shard_tokens) for split in SPLITS}
    for document in documents:
        split = "held_out" if is_held_out(document.group, held_out_percent) else "train"
        writers[split].add(encoder.encode(document), document.byte_count)
    index = {
        "dtype": dtype,
        "vocab_size": encoder.vocab_size,
        "begin_id": encoder.begin_id,
        **{split: writer.finish() for split, writer in writers.items()},
    }
    # The index comes last and in one piece: a folder that has one is complete.
    temporary = folder / f"{_INDEX}.tmp"
    temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / _INDEX)


@dataclass(frozen=True, slots=True)
class TokenShards:
    """One split of a shard folder, mapped into memory.

    Attributes:
        shards: the ids of each file, uint16 or uint32 [tokens].
        vocab_size: every id is below it.
        begin_id: the id that starts each document.
        text_bytes: UTF-8 bytes of the text that the ids stand for.
    """

    shards: tuple[npt.NDArray[np.unsignedinteger[Any]], ...]
    vocab_size: int
    begin_id: int
    text_bytes: int

    @classmethod
    def open(cls, folder: Path, split: str) -> TokenShards:
        """Map the shards of `split`, "train" or "held_out".

        Raises:
            ConfigError: there are no shards in the folder.
            FormatError: the index or a shard is damaged.
        """
        path = folder / _INDEX
        if not path.exists():
            raise ConfigError(f"{folder}: no token shards here ({_INDEX} is missing)")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            dtype, part = np.dtype(index["dtype"]), index[split]
            shards = tuple(_map_shard(folder, entry, dtype) for entry in part["shards"])
            return cls(shards, index["vocab_size"], index["begin_id"], part["text_bytes"])
        except (KeyError, TypeError, ValueError, OSError) as error:
            hint = "delete the folder; the next run writes the shards again"
            raise FormatError(f"{path}: damaged token shards: {error!r}", hint=hint) from error

    @property
    def tokens(self) -> int:
        """Ids in all shards together."""
        return sum(len(shard) for shard in self.shards)

    def documents(self) -> Iterator[Ids]:
        """Yield the ids of each document, begin included, int64 [n]."""
        pending = np.zeros(0, np.int64)
        for shard in self.shards:
            pending = np.concatenate((pending, shard.astype(np.int64)))
            starts = np.flatnonzero(pending == self.begin_id)
            for start, end in itertools.pairwise(starts):
                yield pending[start:end]
            pending = pending[starts[-1] :] if len(starts) else pending
        if len(pending):
            yield pending


def _map_shard(
    folder: Path, entry: dict[str, Any], dtype: np.dtype[Any]
) -> npt.NDArray[np.unsignedinteger[Any]]:
    ids = np.memmap(folder / entry["file"], dtype=dtype, mode="r")
    if len(ids) != entry["tokens"]:
        raise ValueError(
            f"{entry['file']} holds {len(ids)} tokens, the index says {entry['tokens']}"
        )
    return ids


class ShuffledWindows:
    """Batches of token windows in an order that is a function of the seed and the step alone.

    An epoch cuts every shard into windows of `length` ids, starting at an offset of its own so
    that window borders move, and visits all of them in a random order.

    Args:
        shards: the ids.
        length: ids in a window.
        batch_size: windows in a batch.
        seed: fixes offsets and order.

    Raises:
        ConfigError: the text is too short for one batch.
    """

    def __init__(self, shards: TokenShards, length: int, batch_size: int, seed: int) -> None:
        self._shards, self._length, self._batch_size, self._seed = shards, length, batch_size, seed
        # Room for the largest offset, so that every epoch has equally many windows.
        self._counts = [max(0, (len(ids) - length + 1) // length) for ids in shards.shards]
        self.batches_per_epoch = sum(self._counts) // batch_size
        if not self.batches_per_epoch:
            raise ConfigError(
                f"{shards.tokens} tokens are too few for a batch of {batch_size} x {length}",
                hint="add text, or lower training.batch_size or training.sequence_length",
            )
        self._epoch, self._offset, self._order = -1, 0, np.zeros(0, np.int64)

    def batch(self, step: int) -> Ids:
        """Return the batch of a step, int64 [batch_size, length]."""
        epoch, index = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng([self._seed, epoch])
            self._offset = int(random.integers(self._length))
            self._order = random.permutation(sum(self._counts))
            self._epoch = epoch
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return np.stack([self._window(int(window)) for window in chosen])

    def _window(self, window: int) -> Ids:
        for ids, count in zip(self._shards.shards, self._counts, strict=True):
            if window < count:
                start = self._offset + window * self._length
                return ids[start : start + self._length].astype(np.int64)
            window -= count
        raise IndexError(window)
